"""Errors that travel as plain data."""

from __future__ import annotations

import pytest

from pensieve.errors import ConfigError, EngineRestarted, PensieveError, error_from
from pensieve.server.errors import ApiError


@pytest.mark.parametrize("kind", [ConfigError, EngineRestarted, PensieveError])
def test_an_error_comes_back_as_what_it_was(kind: type[PensieveError]) -> None:
    back = error_from(kind.code, "what happened")
    assert type(back) is kind and back.message == "what happened"


def test_a_class_without_a_code_of_its_own_is_no_candidate() -> None:
    assert ApiError.code == PensieveError.code
    assert type(error_from(PensieveError.code, "a bug")) is PensieveError
    assert type(error_from("never heard of", "x")) is PensieveError
