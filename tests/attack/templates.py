"""Model folders of strangers: templates that loop or swell, tokenizers whose patterns blow up, configs that cannot be built.

Knows a model folder's files; never how they are read.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bodies import CHAT, RESPONSES, TOKENIZE
from model import variant
from promises import Check, Notes, add
from served import Served
from wire import get, post
from world import World

ANSWER_S = 30.0
START_S = 60.0
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}BODY{% endfor %}{% endfor %}{% endfor %}"
# `n` is 1: an expression without a variable is computed when the template is compiled, which CONSTANTS try.
TEMPLATES: dict[str, str] = {
    "loop": LOOP.replace("BODY", ""),
    "loop-writing": LOOP.replace("BODY", "a"),
    "swell": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
    "swell-in-json": "{% set ns = namespace(s=[0]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | tojson }}",
    "repeat": "{{ 'a' * (10000000000 * n) }}",
    "format": "{{ '%0*d' % (9999999999 * n, 1) }}",
    "justify": "{{ 'a'.ljust(9999999999 * n) }}",
    "power": "{{ 7 ** (999999999 * n) }}",
    "big-list": "{% set x = [0] * (9999999999 * n) %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "replace": "{{ ('a' * (60000 * n)).replace('a', 'a' * (60000 * n)) | length }}",
    "join": "{{ (['a' * (100000 * n)] * 100000) | join | length }}",
    "indent": "{{ ('\n' * (100000 * n)) | indent(100000) | length }}",
    "center": "{{ 'a' | center(9999999999 * n) }}",
    "sums": LOOP.replace("BODY", "{% set x = a * b * c %}"),
}
CONSTANTS: dict[str, str] = {
    "power": "{{ 7 ** 999999999 }}",
    "repeat": "{{ 'a' * 10000000000 }}",
    "filter": "{{ 'a' | center(9999999999) }}",
}
PROMISE = "A template that never ends or swells fails its own request soon, and no other one."


def chosen(evil: dict[str, str]) -> str:
    """A template that does harm when the last message names it, and is an ordinary one otherwise."""
    cases = "".join(
        f"{{% if messages[-1].content == 'evil-{name}' %}}{{% set n = 1 %}}{harm}{{% endif %}}"
        for name, harm in evil.items()
    )
    return cases + PLAIN


def use(world: World, notes: Notes, server: Served, path: str, body: Any) -> None:
    """The request that sets it off, and then another's."""
    reply = post(server.address, path, body, server.keys["mallory"], ANSWER_S)
    notes.say(f"{path} {reply}", answer_s=round(reply.seconds, 2))
    notes.hold(reply.how == "answered", f"{path}: no answer within {ANSWER_S:g} s ({reply.how})")
    reply = world.chat(server.address, server.keys["bob"], "good morning", timeout_s=20.0)
    notes.hold(reply.status == 200, f"another's chat after it: {reply}")
    notes.hold(get(server.address, "/ready").status == 200, "/ready is not 200 after it")


def chat_of(text: str) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2}


PATTERNS = {
    "nested-plus": r"(a+)+$",
    "alternation": r"(b|b)*$",
    "back-reference": r"(?:(c+)+)\1$",
    "look-ahead": r"(?=(d+)+e$)d",
}
TRIGGERS = {
    "nested-plus": "a" * 40 + "!",
    "alternation": "b" * 40 + "!",
    "back-reference": "c" * 40 + "!",
    "look-ahead": "d" * 40 + "!",
}
TRIGGERS["swelling"] = "q" * 1000


def tokenizer(found: Any) -> None:
    """Patterns that try a text in exponentially many ways, and a replacement that makes it longer twentyfold six times."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS.values()
    ]
    found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, found["pre_tokenizer"]]}
    found["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 20}] * 6,
    }


def evil_model(world: World) -> Path:
    """The folder with all of it, made once."""
    folder = world.folder / "evil"
    return (
        folder
        if folder.is_dir()
        else variant(world.model, folder, template=chosen(TEMPLATES), tokenizer=tokenizer)
    )


def template(name: str) -> Callable[[World, Notes], None]:
    """The check of one template."""

    def check(world: World, notes: Notes) -> None:
        server = world.shared(model=evil_model(world))
        with world.watched(server, notes):
            use(world, notes, server, CHAT, chat_of(f"evil-{name}"))
            use(world, notes, server, TOKENIZE, {"messages": [{"role": "user", "content": f"evil-{name}"}]})

    return check


def pattern(name: str) -> Callable[[World, Notes], None]:
    """The check of one pattern."""

    def check(world: World, notes: Notes) -> None:
        server = world.shared(model=evil_model(world))
        text = TRIGGERS[name]
        with world.watched(server, notes):
            use(world, notes, server, CHAT, chat_of(text))
            use(world, notes, server, TOKENIZE, {"prompt": text})
            use(
                world, notes, server, RESPONSES, {"input": text, "truncation": "auto", "max_output_tokens": 2}
            )

    return check


for _name in TEMPLATES:
    add(
        Check(f"model/template-{_name}", PROMISE, template(_name), quick=_name in ("loop", "swell", "repeat"))
    )
for _name in TRIGGERS:
    promise = "A tokenizer's pattern fails its own request soon, and no other one."
    add(Check(f"model/tokenizer-{_name}", promise, pattern(_name), quick=_name == "nested-plus"))


def constant(name: str) -> Callable[[World, Notes], None]:
    """The check of one template that does its harm when it is compiled."""

    def check(world: World, notes: Notes) -> None:
        folder = variant(world.model, world.new_folder() / "model", template=chosen({name: CONSTANTS[name]}))
        with world.server(tenants=("bob",), model=folder, start=False) as server:
            begun_s = time.monotonic()
            try:
                server.start(timeout_s=START_S)
            except RuntimeError as error:
                ended = server.process is None or server.process.poll() is not None
                killed = server.watch.killed if server.watch is not None else None
                notes.say(f"not started: {str(error)[-150:]!r}")
                notes.hold(
                    killed is None and ended, killed or f"it neither started nor ended within {START_S:g} s"
                )
                notes.hold("Traceback" not in str(error), f"no sentence: {str(error)[-300:]}")
                return
            reply = world.chat(server.address, server.keys["bob"], "good morning")
            notes.say(f"started in {time.monotonic() - begun_s:.0f} s; {reply}")
            notes.hold(reply.status == 200, f"a chat that sets nothing off: {reply}")

    return check


for _name in CONSTANTS:
    promise = "A template that does its harm when it is compiled does not stop the server from starting, or is refused with a sentence."
    add(Check(f"model/constant-{_name}", promise, constant(_name), quick=False))

CONFIGS: dict[str, dict[str, Any]] = {
    "heads": {"num_attention_heads": 3},
    "no-kv-heads": {"num_key_value_heads": 0},
    "no-heads": {"num_attention_heads": 0},
    "negative-layers": {"num_hidden_layers": -1},
    "huge": {"hidden_size": 1 << 40},
    "vocabulary": {"vocab_size": 10},
    "words": {"hidden_size": "many"},
}


def config(world: World, notes: Notes) -> None:
    """A config that cannot be built is refused with a sentence at the first start."""
    for name, changed in CONFIGS.items():
        folder = variant(world.model, world.new_folder() / "model", **changed)
        server = Served(world.new_folder(), folder)
        begun_s = time.monotonic()
        ended = subprocess.run(
            server.command(), capture_output=True, text=True, timeout=START_S * 3, check=False
        )
        told = ended.stdout + ended.stderr
        took_s = time.monotonic() - begun_s
        notes.say(f"{name}: exit {ended.returncode} after {took_s:.0f} s")
        notes.hold(
            ended.returncode != 0 and took_s < START_S,
            f"{name}: exit {ended.returncode} after {took_s:.0f} s",
        )
        notes.hold("Traceback" not in told and "internal" not in told.lower(), f"{name}: {told[-300:]}")


add(
    Check(
        "model/config",
        "A config that cannot be built is refused with a sentence at the first start.",
        config,
        quick=False,
    )
)
