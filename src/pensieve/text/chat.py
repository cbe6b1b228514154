"""A model's tokenizer and chat template: messages to token ids, append-only. Knows text; never weights, caches or stores.

The token log is the truth: what a conversation's model saw and sampled, id by id. A new turn appends its own tokens
to the log and changes nothing before them, so everything cached stays valid, and so do answers whose sampled ids
are not the ones that encoding their text would give. Some templates forbid that: they render an earlier turn
differently once a later one is there (an answer's thinking is stripped, the system prompt moves to the newest
message, the date has changed). Then the log is rendered anew, and a sentence says what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pensieve.chat import Message
from pensieve.errors import InvalidRequest, ModelUnavailable
from pensieve.text.control import ControlGuard, unused_marks
from pensieve.text.detokenize import Detokenizer

# For models without a template. Each message is a paragraph that begins with its speaker's name.
PLAIN_TEMPLATE = (
    "{{ plain_bos }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:",)


@dataclass(frozen=True, slots=True)
class Extension:
    """A token log with a new turn at its end."""

    tokens: list[int]  # the whole log, ready to be answered
    reused_tokens: int  # leading tokens that are those of the old log
    rewritten: str | None  # None: only appended. Otherwise a sentence: where they part, and what has to be computed again


class ChatText:
    """Text in and out of one model.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend.
        options: variables for the template beyond the messages, such as `enable_thinking`.

    Attributes:
        note: what a user should know about how this model is talked to, or None.
        stop_strings: where answers end that no token ends.
        stop_token_ids: ids that end an answer: the tokenizer's end-of-sequence and the template's end-of-turn.

    Raises:
        ModelUnavailable: the tokenizer has no such backend, or several templates and no default.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, object] | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelUnavailable(f"{type(tokenizer).__name__} has no fast tokenizer: convert it to a tokenizer.json")
        backend.no_truncation()  # once, here: `encode` is safe to call from several threads as long as nobody does this again
        backend.no_padding()
        self._tokenizer = tokenizer
        self._backend = backend
        self._options = dict(options or {})
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._byte_ids = _byte_fallback_ids(backend)
        self.note: str | None = None
        self.stop_strings: tuple[str, ...] = ()
        if tokenizer.chat_template:
            self._template = _template_of(tokenizer)
        else:
            self._template = PLAIN_TEMPLATE
            self._options["plain_bos"] = _bos_text(tokenizer, backend)
            self.stop_strings = PLAIN_STOPS
            self.note = 'this model has no chat template: messages are written as plain "User: ..." and "Assistant: ..." paragraphs'
        self._guard = ControlGuard(backend, self._template)
        self._anchors = _anchors(backend)
        self.stop_token_ids = self._find_stop_token_ids()

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, object] | None = None) -> ChatText:
        """The tokenizer and chat template that lie in a model's folder.

        Raises:
            ModelUnavailable: there is none, or it cannot be read.
        """
        if not folder.is_dir():  # transformers would take the path for a hub id
            raise ModelUnavailable(f"no tokenizer at {folder}: not a folder")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # from a dozen loaders
            raise ModelUnavailable(f"no readable tokenizer in {folder}: {error}") from error
        return cls(tokenizer, options)

    @property
    def template(self) -> str:
        """The source of the chat template in use."""
        return self._template

    def first(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation's first turn.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        mark, _ = _marks(messages)
        return self._guard.encode(self._render(messages, mark, add_generation_prompt), mark)

    def extend(self, log: Sequence[int], history: Sequence[Message], new: Sequence[Message]) -> Extension:
        """Append a turn to a token log.

        Args:
            log: ids that the model saw and sampled. Ends with the sampled ids of the last answer, with or without
                an end-of-turn token (an answer can end by length, abort or a stop string).
            history: the messages in the log; the last one is the assistant's answer.
            new: the messages to append, such as the user's next.

        Raises:
            InvalidRequest: the template refuses these messages, or the history does not end with an answer.
        """
        if not history or history[-1].role != "assistant":
            raise InvalidRequest(
                "a conversation goes on after an assistant's message, this history"
                + (f" ends with a {history[-1].role} message" if history else " is empty")
            )
        messages = [*history, *new]
        mark, hole = _marks(messages)
        whole = self._render(messages, mark)
        with_hole = self._render(messages, mark, hole_at=len(history) - 1, hole=hole)
        before, _, after = with_hole.partition(hole)
        answer = self._guard.hide(history[-1].content, "assistant", mark)
        asked = self._render(history[:-1], mark) if len(history) > 1 else before
        if asked.rstrip() == before.rstrip() and _fills(whole, before, after, answer) and self._begins_with(log, history, whole, mark):
            return Extension([*log, *self._closing(log, after, mark)], len(log), None)
        tokens = self._guard.encode(whole, mark)
        reused = _common_prefix(log, tokens)
        if reused == len(log):
            return Extension(tokens, reused, None)
        return Extension(
            tokens,
            reused,
            f"the chat template now writes earlier turns differently from token {reused} on: {len(log) - reused} of the"
            f" {len(log)} tokens in the log are void, and {len(tokens) - reused} of {len(tokens)} have to be computed",
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that goes on an answer: no control tokens come out of it, and no leading space goes in."""
        (mark,) = unused_marks([text], 1)
        return self._encode_inside(self._guard.hide(text, "assistant", mark), mark)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens written out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokeniser for one answer."""
        return Detokenizer(self.decode, self._special_ids, self._byte_ids)

    def count(self, messages: Sequence[Message]) -> int:
        """How many tokens these messages have as a prompt of their own."""
        return len(self.first(messages))

    def _render(
        self, messages: Sequence[Message], mark: str, add_generation_prompt: bool = True, hole_at: int | None = None, hole: str = ""
    ) -> str:
        """The template's text, with placeholders for control tokens and, if asked for, `hole` in place of one message."""
        if not messages:
            raise InvalidRequest("a prompt needs at least one message, got none")
        dicts = [{"role": m.role, "content": self._guard.hide(m.content, m.role, mark)} for m in messages]
        if hole_at is not None:
            dicts[hole_at]["content"] = hole
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    dicts, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
                )
            )
        except Exception as error:  # a template is foreign code and fails in any way it likes
            roles = ", ".join(message.role for message in messages)
            raise InvalidRequest(f"the model's chat template refuses these messages ({roles}): {error}") from error

    def _closing(self, log: Sequence[int], after: str, mark: str) -> list[int]:
        """Ids that end the last answer and begin the next one; the end-of-turn token only if the log lacks it."""
        closing = self._guard.leading_control(after)
        if closing is None or not log or log[-1] != closing[1]:
            return self._encode_inside(after, mark)
        ids = self._guard.encode(after.lstrip(), mark)
        return ids[1:] if ids[:1] == [closing[1]] else ids

    def _encode_inside(self, text: str, mark: str) -> list[int]:
        """Encode text that does not stand at the beginning, where a tokenizer may put a space of its own."""
        if not text:
            return []
        begins_with_control = not text[0].isspace() and self._guard.leading_control(text) is not None
        for anchor, anchor_ids in () if begins_with_control else self._anchors:
            ids = self._guard.encode(anchor + text, mark)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._guard.encode(text, mark)

    def _begins_with(self, log: Sequence[int], history: Sequence[Message], whole: str, mark: str) -> bool:
        """Whether the log begins as this template would begin it now, up to the first answer.

        Not so when the system prompt depends on the date, or the log was made with another template.
        """
        head = next(i for i, message in enumerate(history) if message.role == "assistant")
        if head == 0:
            return True
        text = self._render(history[:head], mark)
        shared = text[: _common_prefix(text, whole)]
        ids = self._guard.encode(shared, mark)
        return _common_prefix(ids, log) >= len(ids) - 1  # the last one may have merged with what followed

    def _find_stop_token_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id} if self._tokenizer.eos_token_id is not None else set()
        mark, hole = unused_marks((), 2)
        try:
            rendered = self._render([Message("user", "?"), Message("assistant", hole)], mark, add_generation_prompt=False)
        except InvalidRequest:
            return frozenset(ids)  # an unusual template: its users bring their own stop tokens
        closing = self._guard.leading_control(rendered.rpartition(hole)[2])
        if closing is not None and closing[1] in self._special_ids:
            ids.add(closing[1])
        return frozenset(ids)


def _marks(messages: Sequence[Message]) -> tuple[str, str]:
    mark, hole = unused_marks((message.content for message in messages), 2)
    return mark, hole


def _fills(whole: str, before: str, after: str, answer: str) -> bool:
    """Whether `whole` is `before`, the answer and `after`. White space does not count: the log has the answer's own."""
    if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
        return False
    return whole[len(before) : len(whole) - len(after)].split() == answer.split()


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the longest common beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _template_of(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, none of them the default
        raise ModelUnavailable(f"the tokenizer's chat template cannot be used: {error}") from error


def _anchors(backend: Any) -> list[tuple[str, list[int]]]:
    """Beginnings, with their ids, after which a tokenizer takes text as it is; the first that does not merge with it serves.

    A special token is enough for most. Older sentencepiece conversions put a space even after that one, but not
    after a character from no script at all, which they spell in bytes.
    """
    added = sorted(backend.get_added_tokens_decoder().items())
    special = next((str(token.content) for _, token in added if token.special and token.content and not token.rstrip), None)
    if special is None:
        return []
    puts_space = backend.decode(backend.encode(special + "x", add_special_tokens=False).ids, skip_special_tokens=False) != special + "x"
    texts = [special + "\ue000", special] if puts_space else [special]
    return [(text, list(backend.encode(text, add_special_tokens=False).ids)) for text in texts]


def _bos_text(tokenizer: Any, backend: Any) -> str:
    """The beginning-of-sequence token's text, if the tokenizer begins plain text with it."""
    ids = backend.encode("a", add_special_tokens=True).ids
    return str(tokenizer.bos_token) if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id] else ""


def _byte_fallback_ids(backend: Any) -> frozenset[int]:
    """Ids of the tokens that stand for single bytes, `<0x00>` to `<0xFF>`, where the decoder knows them as such."""
    if "ByteFallback" not in repr(backend.decoder):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)
