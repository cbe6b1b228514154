"""Keeps control tokens for the template: text of a message never becomes one.

Knows a tokenizer's vocabulary and rendered text; never messages or logs.

A tokenizer finds `<|im_end|>` anywhere, also where a user typed it: a user could end their own turn and speak
as another role. So control text in a message is replaced by a placeholder before the template sees it. What
still looks like a control token after rendering is the template's own. If there are placeholders, the text is
encoded by a *twin* of the tokenizer in which every control token has a secret name: the template's tokens are
written by that name, and the user's text stays plain text. Text without placeholders is encoded by the
tokenizer itself, so that ordinary prompts get exactly their usual ids.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
from collections.abc import Iterable
from typing import Any

from pensieve.errors import InvalidRequest

# Private-use characters. Only the pair of a mark, chosen for each rendering, and an index is a placeholder.
FIRST_MARK = 0xF0000
LAST_MARK = 0xFFFFD
FIRST_INDEX = 0x100000

# Roles whose text is neither the operator's nor the model's: tokens like <tool_response> are control tokens
# there too.
UNTRUSTED_ROLES = frozenset({"user", "tool"})


def unused_marks(texts: Iterable[str], count: int) -> list[str]:
    """`count` private-use characters that occur in none of the texts."""
    taken = {char for text in texts for char in text if ord(char) >= FIRST_MARK}
    free = (chr(code) for code in range(FIRST_MARK, LAST_MARK + 1) if chr(code) not in taken)
    try:
        return [next(free) for _ in range(count)]
    except StopIteration:
        raise InvalidRequest(
            f"the messages use all of the {LAST_MARK - FIRST_MARK + 1} private-use characters of plane 15"
        ) from None


class ControlGuard:
    """Encodes rendered templates; text that came from messages never becomes a control token.

    Control tokens are the tokenizer's special tokens, in every role. For untrusted roles they are also the
    other added tokens that the template writes (`<think>`, `</tool_response>`), which a model's own text may
    contain.

    Args:
        backend: a `tokenizers.Tokenizer`.
        template: the chat template's source.
    """

    def __init__(self, backend: Any, template: str) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        special = [token.content for token in added.values() if token.special]
        markup = [
            t.content
            for t in added.values()
            if not t.special and not t.content.isspace() and t.content in template
        ]
        self._controls = [text for text in dict.fromkeys([*special, *markup]) if text]
        self._index = {text: index for index, text in enumerate(self._controls)}
        self._trusted = _any_of(special)
        self._untrusted = _any_of(self._controls)
        self._aliases: list[str] = []
        self._twin: Any = None
        self._twin_lock = threading.Lock()

    def hide(self, text: str, role: str, mark: str) -> str:
        """A message's text with placeholders for its control tokens. No message may contain `mark`."""
        pattern = self._untrusted if role in UNTRUSTED_ROLES else self._trusted
        return pattern.sub(lambda match: mark + chr(FIRST_INDEX + self._index[match[0]]), text)

    def show(self, rendered: str, mark: str) -> str:
        """A rendering with the control text in place of its placeholders."""
        return re.sub(
            re.escape(mark) + "(.)",
            lambda match: self._controls[ord(match[1]) - FIRST_INDEX],
            rendered,
            flags=re.DOTALL,
        )

    def encode(self, rendered: str, mark: str) -> list[int]:
        """Token ids of a rendering whose messages went through `hide` with the same mark.

        Raises:
            InvalidRequest: it has placeholders, and this tokenizer cannot spell control tokens as text.
        """
        if mark not in rendered:
            return list(self._backend.encode(rendered, add_special_tokens=False).ids)
        twin = self._get_twin()
        aliased = self._untrusted.sub(lambda match: self._aliases[self._index[match[0]]], rendered)
        return list(twin.encode(self.show(aliased, mark), add_special_tokens=False).ids)

    def prepare(self) -> None:
        """Build the twin now, if this tokenizer can have one."""
        with contextlib.suppress(InvalidRequest):  # requests that need it get the error
            self._get_twin()

    def leading_control(self, text: str) -> tuple[str, int] | None:
        """The control token that `text` begins with after white space: its text and id.

        None if there is none.
        """
        match = self._untrusted.match(text, len(text) - len(text.lstrip()))
        return None if match is None else (match[0], self._backend.token_to_id(match[0]))

    def _get_twin(self) -> Any:
        with (
            self._twin_lock
        ):  # built only if needed, and once: it takes about as long as loading the tokenizer
            if self._twin is None:
                self._aliases = [f"\U0010ff00{secrets.token_hex(8)}\U0010ff01" for _ in self._controls]
                try:
                    twin = self._build_twin(dict(zip(self._controls, self._aliases, strict=True)))
                except Exception as error:  # the Rust library raises bare exceptions
                    raise self._no_twin(str(error)) from error
                for text, alias in zip(self._controls, self._aliases, strict=True):
                    if twin.encode(alias, add_special_tokens=False).ids != [self._backend.token_to_id(text)]:
                        raise self._no_twin(f"{text!r} cannot be renamed")
                self._twin = twin
            return self._twin

    def _no_twin(self, reason: str) -> InvalidRequest:
        return InvalidRequest(
            f"a message spells out one of the model's control tokens ({', '.join(self._controls[:4])}, ...), "
            "and this tokenizer cannot"
            f" encode them as plain text ({reason}): write them differently, with a space inside for instance"
        )

    def _build_twin(self, names: dict[str, str]) -> Any:
        from tokenizers import Tokenizer

        spec = json.loads(self._backend.to_str())
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
        else:  # Unigram: [text, score] pairs
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:  # some vocabularies merge plain text into a control token
            pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [[left, right] for left, right in pairs if left + right not in names]
        return Tokenizer.from_str(json.dumps(spec))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; it matches nothing if there are none."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if text) or r"(?!)"
    )
