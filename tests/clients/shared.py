"""What the clients' checks share: where the server is, what to say to it, what a cache hit is. Knows the standard library only.

The checks run in the clients' own environments (see run.py); these hold no Pensieve.
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

if "PENSIEVE_URL" not in os.environ:
    pytest.exit("the clients' checks need a server: run tests/clients/run.py, which starts one", returncode=2)

URL = os.environ["PENSIEVE_URL"]  # no slash at the end
BASE = URL + "/v1"
KEY = os.environ["PENSIEVE_KEY"]
OTHER_KEY = os.environ["PENSIEVE_OTHER_KEY"]  # another tenant's
MAX_OPEN = int(os.environ["PENSIEVE_MAX_OPEN"])  # requests that the server takes at once
MODEL = "smollm2"
CHUNK = 32  # tokens that are cached, shared and dropped together

# Long enough for several chunks, so that a hit cannot be mistaken for anything else.
STORY = (
    "A lighthouse keeper on a small island writes down the weather four times a day. On Monday the wind came from the west and it rained "
    "until noon. On Tuesday there was fog, and the horn sounded every two minutes. On Wednesday a supply boat brought flour, oil, letters "
    "and a grey cat that nobody had ordered. On Thursday the cat caught a mouse. "
)

BRIEF = "Answer with one word."  # said by the system, it makes this model come to an end

# A model of this size calls nothing by itself, and writes what it likes for arguments: the call is forced, and this one comes to its end soon.
WORD = {"type": "object", "properties": {"word": {"type": "string"}}}
SAY = {"type": "function", "function": {"name": "say", "description": "Say a word", "parameters": WORD}}
CALL_TOKENS = 200  # enough for it
ATTEMPTS = 5


class Astray(Exception):
    """The model wrote no whole call, or came to no end: nothing that a server or a client could help."""


def patiently(check: Callable[..., None]) -> Callable[..., None]:
    """A check that needs a sensible model, which this one is not always: begun again, with other words, where it went astray."""

    @functools.wraps(check)
    def attempts(*arguments: Any, **keywords: Any) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return check(*arguments, **keywords)
            except Astray:
                if attempt == ATTEMPTS:
                    raise
        return None

    return attempts


def sensible(condition: Any) -> None:
    """Whether the model did what the check needs.

    Raises:
        Astray: it did not.
    """
    if not condition:
        raise Astray


def is_object(text: str) -> bool:
    """Arguments that are what they should be: an object, in JSON."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def unique(text: str) -> str:
    """Words that no earlier run has said: what is cached of them is this check's doing."""
    return f"Question {random.randrange(10**9)}. {text}"  # (long hexadecimal numbers lead this model astray)


def assert_hit(cached: int | None, before: int, *, branch: bool = False) -> None:
    """A turn's cached tokens are the whole history's: `before`, prompt and answer of the turn before; its last token has no KV yet.

    A `branch`, where another turn has gone on from the same one, shares whole chunks, and perhaps the beginning of that turn.
    """
    assert cached is not None
    least, most = (before - CHUNK, before + CHUNK) if branch else (before - 2, before)
    assert least <= cached <= most, f"{cached} cached tokens, where the turn before had {before}"


def get(path: str, key: str = KEY) -> Any:
    """A GET that knows no client."""
    request = urllib.request.Request(URL + path, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def until_idle(timeout_s: float = 20.0) -> None:
    """Wait until the server computes nothing for anybody, however its clients have left."""
    deadline = time.monotonic() + timeout_s
    while (stats := get("/v1/pensieve/map?limit=0")["stats"])["running"] or stats["waiting"]:
        assert time.monotonic() < deadline, f"still under way: {stats}"
        time.sleep(0.05)
