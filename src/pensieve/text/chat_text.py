"""A model's tokenizer and chat template: messages to token ids and back.

Knows text; never weights, caches or stores.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pensieve.errors import InvalidRequest, ModelRefused, ModelUnavailable
from pensieve.message import Message
from pensieve.text.control import ControlGuard, unused_marks
from pensieve.text.detokenize import Detokenizer
from pensieve.text.overflow import FREE_CHARS, surely_exceed
from pensieve.text.prompt_writer import Extension, PromptWriter
from pensieve.text.reasoning import BEGIN_REASONING, END_REASONING, ReasoningSplitter
from pensieve.text.template import PLAIN_STOPS, PromptTemplate, Turn
from pensieve.text.tool_format import PLAIN_MARKUP, ToolFormat, Tools


class ChatText:
    """Text in and out of one model.

    Tools have the form of the OpenAI API. A template that can write tools, calls and results writes them. For
    other templates (`writes_tools_plainly`) they are written as text: `tools_prompt` at the end of the system
    message (made if there is none, or put before the first user message if the template has no system
    messages), calls as `<tool_call>` in the assistant's text, results as a user's message `<tool_response>`.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend.
        options: variables for the template beyond the messages, such as `enable_thinking`.

    Attributes:
        note: what a user should know about how this model is prompted; None if there is nothing to say.
        stop_strings: strings that end an answer, for models without an end-of-turn token.
        stop_token_ids: ids that end an answer: the tokenizer's end-of-sequence and the template's
            end-of-turn.

    Raises:
        ModelUnavailable: the tokenizer has no such backend, or several templates and no default.
        ModelRefused: the tokenizer's decoder uses a regular expression, whose time has no bound.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, object] | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelUnavailable(
                f"{type(tokenizer).__name__} has no fast tokenizer: convert it to a tokenizer.json"
            )
        # Once, here: `encode` may be called from several threads as long as these settings do not change.
        backend.no_truncation()
        backend.no_padding()
        if backend.decoder is not None and b'"Regex"' in backend.decoder.__getstate__():
            raise ModelRefused(
                "the tokenizer's decoder searches by a regular expression, which may take any time: take "
                "another tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._backend = backend
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._byte_ids = _byte_fallback_ids(backend)
        self._token_texts: dict[int, str] = {}  # by id
        self._template = PromptTemplate(tokenizer, options or {}, _bos_text(tokenizer, backend))
        self.note: str | None = None
        self.stop_strings: tuple[str, ...] = ()
        if self._template.is_plain:
            self.stop_strings = PLAIN_STOPS
            self.note = (
                'this model has no chat template: messages are written as plain "User: ..." and '
                '"Assistant: ..." paragraphs (--chat-template FILE gives it one)'
            )
        elif self._template.trouble is not None:
            self.note = (
                f"the model's chat template does not write {self._template.trouble}: "
                "--chat-template FILE gives it another"
            )
        markup = self.tool_format.markers if self._template.writes_calls else PLAIN_MARKUP
        self._guard = ControlGuard(
            backend, "\n".join([self._template.source, self._template.tools_source, *markup])
        )
        self.stop_token_ids = self._find_stop_token_ids()
        self._writer = PromptWriter(backend, self._template, self._guard, self.stop_token_ids)

    @classmethod
    def load(
        cls, folder: Path, options: Mapping[str, object] | None = None, template: str | None = None
    ) -> ChatText:
        """Load the tokenizer and chat template of a model's folder.

        Args:
            folder: the model's.
            options: see the class.
            template: a chat template in place of the model's own.

        Raises:
            ModelUnavailable: there is no tokenizer, or it cannot be read.
        """
        if not folder.is_dir():  # transformers would take the path for a hub id
            raise ModelUnavailable(f"no tokenizer at {folder}: not a folder")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the loaders raise errors of many kinds
            raise ModelUnavailable(
                f"no readable tokenizer in {folder}: {' '.join(str(error).split())[:400]}{_way_out(folder)}"
            ) from error
        if template is not None:
            tokenizer.chat_template = template
        return cls(tokenizer, options)

    @property
    def max_chars(self) -> int | None:
        """The most characters of a rendered prompt; longer ones are refused before they are tokenized.

        None if unlimited.
        """
        return self._writer.max_chars

    @max_chars.setter
    def max_chars(self, most: int | None) -> None:
        self._writer.max_chars = most

    @property
    def template(self) -> str:
        """The source of the chat template in use."""
        return self._template.source

    @property
    def supports_tools(self) -> bool:
        """Whether the template writes a list of tools that it is given."""
        return self._template.supports_tools

    @property
    def writes_tools_plainly(self) -> bool:
        """Whether tools and calls are written as text.

        It is so if the template cannot write calls, or not in a form that we can parse.
        """
        return not self._template.writes_calls

    @property
    def tool_format(self) -> ToolFormat:
        """The form in which the model writes calls: its template's, or the one that the prompt asks for."""
        return self._template.tool_format

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Special tokens that delimit calls and reasoning; `detokenizer` must keep them for their parsers."""
        markers = (*self.tool_format.markers, BEGIN_REASONING, END_REASONING)
        return frozenset(
            i for marker in markers if (i := self._backend.token_to_id(marker)) in self._special_ids
        )

    def first(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, tools: Tools | None = None
    ) -> list[int]:
        """Token ids of a conversation's first turn; see `PromptWriter.first`."""
        return self._writer.first(messages, add_generation_prompt, tools=tools)

    def extend(
        self,
        log: Sequence[int],
        history: Sequence[Message],
        new: Sequence[Message],
        *,
        tools: Tools | None = None,
    ) -> Extension:
        """Append a turn to a token log; see `PromptWriter.extend`."""
        return self._writer.extend(log, history, new, tools=tools)

    @property
    def has_reasoning(self) -> bool:
        """Whether the template knows answers that begin with `<think>`."""
        return END_REASONING in self._template.source

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt that is not a chat.

        Control tokens in it are encoded as such: all of it is the sender's.
        """
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def settle(self) -> None:
        """Try the template now for everything that is otherwise found out on first use."""
        _ = (self.marker_ids, self._begins_thinking, self.longest_token)
        self._writer.settle()

    def prepare_twin(self) -> None:
        """Build the twin tokenizer now, which prompts need if a message spells out a control token.

        Takes about as long as loading the tokenizer.
        """
        self._guard.prepare()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def most_chars(self, max_tokens: int) -> int:
        """The most characters that `max_tokens` tokens can hold.

        Longer text is refused without tokenizing it.
        """
        return max(FREE_CHARS, self.longest_token * max_tokens)

    def exceeds(self, messages: Iterable[Message], max_tokens: int, tools: Tools | None = None) -> bool:
        """Whether messages surely have more tokens than this. Fast, however long they are.

        Text that a template may leave out does not count: white space around a message, and an answer's
        reasoning.
        """
        texts = [message.content.rpartition(END_REASONING)[2].strip() for message in messages]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
        return surely_exceed(
            texts, max_tokens, lambda text: len(self.encode_prompt(text, add_special_tokens=False))
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that continues an answer: no control tokens, no added leading space."""
        (mark,) = unused_marks([text], 1)
        return self._writer.encode_inside(self._guard.hide(text, "assistant", mark), mark)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of text that we let an answer begin with, such as `force_prefix`.

        Its markers become control tokens. Only for our own text: a user's text goes through `encode_text`.
        """
        (mark,) = unused_marks([text], 1)
        return self._writer.encode_inside(text, mark)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of some ids, with special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """The text of one id, also of a special token.

        Cached: log-probabilities name the same tokens again and again.
        """
        if (found := self._token_texts.get(token_id)) is None:
            found = self._token_texts[token_id] = self.decode_all([token_id])
        return found

    def detokenizer(self, keep: Collection[int] = ()) -> Detokenizer:
        """A fresh incremental detokeniser for one answer.

        Args:
            keep: special tokens to write out, such as `marker_ids` for `ToolCallParser` and
                `ReasoningSplitter`.
        """
        return Detokenizer(self.decode_all, self._special_ids.difference(keep), self._byte_ids)

    def reasoning_splitter(self) -> ReasoningSplitter:
        """Splits an answer into reasoning and content.

        All is content if the template does not know `</think>`.
        """
        return ReasoningSplitter(
            enabled=self.has_reasoning, inside=self.has_reasoning and self._begins_thinking
        )

    def count(self, messages: Sequence[Message], *, tools: Tools | None = None) -> int:
        """The number of tokens of these messages as a prompt of their own."""
        return len(self.first(messages, tools=tools))

    @cached_property
    def _begins_thinking(self) -> bool:
        return self._template.begins_thinking()

    def _find_stop_token_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id} if self._tokenizer.eos_token_id is not None else set()
        (hole,) = unused_marks((), 1)
        turns: list[Turn] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": hole}]
        try:
            rendered = self._template.render(turns, None, add_generation_prompt=False)
        except InvalidRequest:
            return frozenset(ids)  # an unusual template: requests must bring stop tokens
        closing = self._guard.leading_control(rendered.rpartition(hole)[2])
        if closing is not None and closing[1] in self._special_ids:
            ids.add(closing[1])
        call = self._backend.encode(self._template.probe_call(), add_special_tokens=False).ids
        ids.update([i for i in call if i in self._special_ids][-1:])  # a token may end calls only
        return frozenset(ids)


def _way_out(folder: Path) -> str:
    """Advice for a tokenizer that cannot be read."""
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        return (
            ". It has tokenizer.model only: `pip install sentencepiece tiktoken` may read it, or put the "
            "model's "
            "tokenizer.json beside it"
        )
    return ". Fetch its tokenizer.json and tokenizer_config.json again"


def _bos_text(tokenizer: Any, backend: Any) -> str:
    """The beginning-of-sequence token's text, if the tokenizer begins plain text with it."""
    ids = backend.encode("a", add_special_tokens=True).ids
    return (
        str(tokenizer.bos_token)
        if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]
        else ""
    )


def _byte_fallback_ids(backend: Any) -> frozenset[int]:
    """Ids of the tokens for single bytes, `<0x00>` to `<0xFF>`; empty if the decoder has no byte fallback."""
    if "ByteFallback" not in repr(backend.decoder):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)
