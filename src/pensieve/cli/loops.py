"""Which event loop the commands run on. Knows asyncio and uvloop; never what runs there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """A factory for `asyncio.Runner`: uvloop if installed, which halves the work per socket; else None."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
