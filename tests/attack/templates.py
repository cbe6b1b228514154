"""Model folders of strangers: templates that loop or swell, tokenizers whose patterns blow up, configs that cannot be built.

Knows a model folder's files; never how they are read.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

from bodies import CHAT, RESPONSES, TOKENIZE
from model import variant
from promises import Check, Notes, add
from served import Served
from wire import get, post
from world import World

ANSWER_S = 30.0
START_S = 60.0
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WHEN = "{% if 'hello' in messages[-1].content %}EVIL{% endif %}" + PLAIN
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
SWELL = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}"
TEMPLATES: dict[str, str] = {
    "loop": LOOP,
    "loop-writing": LOOP.replace("{% endfor %}{% endfor %}{% endfor %}", "a{% endfor %}{% endfor %}{% endfor %}"),
    "swell": SWELL,
    "repeat": "{{ 'a' * 10000000000 }}",
    "format": "{{ '%09999999999d' % 1 }}",
    "justify": "{{ 'a'.ljust(9999999999) }}",
    "power": "{{ 7 ** 999999999 }}",
    "big-list": "{% set x = [0] * 9999999999 %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "replace": "{{ ('a' * 60000).replace('a', 'a' * 60000) | length }}",
    "join": "{{ (['a' * 100000] * 100000) | join | length }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) | length }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "lipsum": "{{ lipsum(n=9999999) }}",
}
QUICK = {"loop", "swell", "repeat"}
PROMISE = "A template that never ends or swells fails its own request soon, and no other one."


def use(world: World, notes: Notes, server: Served, ask: Callable[[str], tuple[str, Any]], trigger: str) -> None:
    """The request that sets it off, three times over, and then the others."""
    for _ in range(2):
        path, body = ask(trigger)
        reply = post(server.address, path, body, server.keys["mallory"], ANSWER_S)
        notes.say(str(reply), answer_s=round(reply.seconds, 2))
        notes.hold(reply.how == "answered", f"no answer within {ANSWER_S:g} s ({reply.how})")
        notes.hold(reply.status < 600 and reply.status != 0, f"{reply}")
    reply = world.chat(server.address, server.keys["bob"], "good morning", timeout_s=20.0)
    notes.hold(reply.status == 200, f"another's chat after it: {reply}")
    notes.hold(get(server.address, "/ready").status == 200, "/ready is not 200 after it")


def chat_of(text: str) -> tuple[str, Any]:
    return CHAT, {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2}


def template(name: str) -> Callable[[World, Notes], None]:
    """The check of one template."""

    def check(world: World, notes: Notes) -> None:
        folder = variant(world.model, world.new_folder() / "model", template=WHEN.replace("EVIL", TEMPLATES[name]))
        with world.server(tenants=("bystander", "mallory", "bob"), model=folder) as server, world.watched(server, notes):
            use(world, notes, server, chat_of, "hello")

    return check


for _name in TEMPLATES:
    add(Check(f"model/template-{_name}", PROMISE, template(_name), quick=_name in QUICK))


def _split(pattern: str) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}

    return change


def _normalise(pattern: str, content: str) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        one = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [one] * 6}

    return change


TOKENIZERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "nested-plus": (_split(r"(a+)+$"), "a" * 40 + "!"),
    "alternation": (_split(r"(a|a)*$"), "a" * 40 + "!"),
    "back-reference": (_split(r"(?:(a+)+)\1$"), "a" * 40 + "!"),
    "swelling": (_normalise("q", "qqqqqqqqqqqqqqqqqqqq"), "q" * 1000),
}


def tokenizer(name: str) -> Callable[[World, Notes], None]:
    """The check of one tokenizer."""
    change, text = TOKENIZERS[name]

    def check(world: World, notes: Notes) -> None:
        folder = variant(world.model, world.new_folder() / "model", tokenizer=change)
        with world.server(tenants=("bystander", "mallory", "bob"), model=folder) as server, world.watched(server, notes):
            use(world, notes, server, chat_of, text)
            use(world, notes, server, lambda text: (TOKENIZE, {"prompt": text}), text)
            use(world, notes, server, lambda text: (RESPONSES, {"input": text, "truncation": "auto", "max_output_tokens": 2}), text)

    return check


for _name in TOKENIZERS:
    add(
        Check(
            f"model/tokenizer-{_name}",
            "A tokenizer's pattern fails its own request soon, and no other one.",
            tokenizer(_name),
            quick=_name == "nested-plus",
        )
    )

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
        ended = subprocess.run(server.command(), capture_output=True, text=True, timeout=START_S * 3, check=False)
        told = ended.stdout + ended.stderr
        took_s = time.monotonic() - begun_s
        notes.say(f"{name}: exit {ended.returncode} after {took_s:.0f} s")
        notes.hold(ended.returncode != 0 and took_s < START_S, f"{name}: exit {ended.returncode} after {took_s:.0f} s")
        notes.hold("Traceback" not in told and "internal" not in told.lower(), f"{name}: {told[-300:]}")


add(Check("model/config", "A config that cannot be built is refused with a sentence at the first start.", config, quick=False))
