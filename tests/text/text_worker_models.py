"""Tokenizers and templates for worker processes, honest and hostile.

Functions that a process finds by their names.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pensieve.text import ChatText

LOOP = (
    "{% for m in messages %}{% if 'loop' in m.content %}{% for i in range(99999) %}{% for j in range(99999) "
    "%}"
    "{% if i + j < 0 %}x{% endif %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)
DOUBLE = (
    "{% for m in messages %}{% if 'double' in m.content %}{% set ns = namespace(s=m.content) %}"
    "{% for i in range(31) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}{% endif %}{% endfor %}"
)
WRITE = "{% for m in messages %}{% if 'write' in m.content %}{% for i in range(99999) %}{{ 'x' * 50000 }}{% endfor %}{% endif %}{% endfor %}"
ALWAYS = "{% for i in range(99999) %}{% for j in range(99999) %}{% if i + j < 0 %}x{% endif %}{% endfor %}{% endfor %}"


def prepare() -> None:
    """What a server's front end does: transformers without torch."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import transformers

    _ = transformers.AutoTokenizer


def good() -> ChatText:
    prepare()
    from text_tokenizers import CHATML, chat

    return chat(CHATML)


def hostile() -> ChatText:
    """Its template loops, doubles or writes without end when a message says so.

    Its tokenizer needs the square of their number for many `x` and gives up at many `a` in a row.
    """
    prepare()
    from text_tokenizers import CHATML, chat

    return chat(LOOP + DOUBLE + WRITE + CHATML, _searching("(a+)+$|x+y"))


def hostile_when_loaded() -> ChatText:
    prepare()
    from text_tokenizers import CHATML, chat

    return chat(ALWAYS + CHATML)


def _searching(pattern: str) -> Any:
    from text_tokenizers import byte_level
    from tokenizers import Tokenizer

    spec = json.loads(byte_level().to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    return Tokenizer.from_str(json.dumps(spec))


def refused() -> ChatText:
    from pensieve.errors import ModelUnavailable

    raise ModelUnavailable("no readable tokenizer here")


def killed() -> ChatText:
    os.kill(os.getpid(), 9)
    raise AssertionError


def constant() -> ChatText:
    """Its template has a constant of 3 GB, which jinja computes when it reads the template."""
    prepare()
    from text_tokenizers import CHATML, chat

    return chat("{% if messages[0].content == 'large' %}{{ 'x' * 3000000000 }}{% endif %}" + CHATML)
