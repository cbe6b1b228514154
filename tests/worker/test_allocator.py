"""The C library is told, and says whether it listened; what that gains is a matter of docs/log/performance.md."""

from __future__ import annotations

import platform
import sys

import pytest

from pensieve.worker import allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_glibc_takes_the_settings() -> None:
    assert allocator.keep_freed_memory()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
