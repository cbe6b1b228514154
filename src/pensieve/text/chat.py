"""A model's tokenizer and chat template: messages to token ids, append-only.

Knows text; never weights, caches or stores.

The token log is the truth: what a conversation's model saw and sampled, id by id. A new turn appends its own
tokens to the log and changes nothing before them, so everything cached stays valid, and so do answers whose
sampled ids are not the ones that encoding their text would give. Some templates forbid that: they render an
earlier turn differently once a later one is there (an answer's thinking is stripped, the system prompt moves
to the newest message, the date or the list of tools has changed). Then the log is rendered anew, and a
sentence says what that costs.

An answer that calls tools is such an answer too: the log holds it as the model wrote it, whatever a client
makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pensieve.errors import ContextLengthExceeded, InvalidRequest, ModelRefused, ModelUnavailable
from pensieve.message import Message
from pensieve.text.control import ControlGuard, unused_marks
from pensieve.text.detokenize import Detokenizer
from pensieve.text.overflow import FREE_CHARS, surely_exceed
from pensieve.text.reasoning import BEGIN_REASONING, END_REASONING, ReasoningSplitter
from pensieve.text.template import PLAIN_STOPS, PROBE_TOOLS, PromptTemplate, Turn
from pensieve.text.tool_format import PLAIN_MARKUP, ToolFormat, Tools, map_texts, texts_in, tool_names


@dataclass(frozen=True, slots=True)
class Extension:
    """A token log with a new turn at its end."""

    tokens: list[int]  # the whole log, ready to be answered
    reused_tokens: int  # leading tokens that are those of the old log
    # None: only appended. Otherwise a sentence: where they part, and what has to be computed again
    rewritten: str | None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Messages and tools with placeholders for control tokens."""

    turns: list[Turn]
    tools: Tools | None
    mark: str  # begins every placeholder
    hole: str  # a character that occurs nowhere


class ChatText:
    """Text in and out of one model.

    Tools are given as the OpenAI API has them. A template that writes tools, calls and tools' answers itself
    is left to do so. For any other (`writes_tools_plainly`) they are written as words: `tools_prompt` at the
    end of the system message (made if there is none, or in front of the first user's words if the template
    has no system messages), calls as `<tool_call>` into the assistant's words, tools' answers as a user's
    message `<tool_response>`.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend.
        options: variables for the template beyond the messages, such as `enable_thinking`.

    Attributes:
        note: what a user should know about how this model is talked to, or None.
        stop_strings: where answers end that no token ends.
        stop_token_ids: ids that end an answer: the tokenizer's end-of-sequence and the template's
            end-of-turn.
        max_chars: of what the template writes; more is refused before it is tokenized. None: no limit.

    Raises:
        ModelUnavailable: the tokenizer has no such backend, or several templates and no default.
        ModelRefused: the tokenizer's decoder searches by a regular expression, which could take any time at
            any token.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, object] | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelUnavailable(
                f"{type(tokenizer).__name__} has no fast tokenizer: convert it to a tokenizer.json"
            )
        # once, here: `encode` is safe to call from several threads as long as nobody does this again
        backend.no_truncation()
        backend.no_padding()
        if backend.decoder is not None and b'"Regex"' in backend.decoder.__getstate__():
            raise ModelRefused(
                "the tokenizer's decoder searches by a regular expression, which may take any time: take "
                "another tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._backend = backend
        self.max_chars: int | None = None
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._byte_ids = _byte_fallback_ids(backend)
        self._token_texts: dict[int, str] = {}  # by id, at most the vocabulary
        self._template = PromptTemplate(tokenizer, options or {}, _bos_text(tokenizer, backend))
        self.note: str | None = None
        self.stop_strings: tuple[str, ...] = ()
        if self._template.is_plain:
            self.stop_strings = PLAIN_STOPS
            self.note = (
                'this model has no chat template: messages are written as plain "User: ..." and "Assistant: ..." paragraphs '
                "(--chat-template FILE gives it one)"
            )
        elif self._template.trouble is not None:
            self.note = f"the model's chat template does not write {self._template.trouble}: --chat-template FILE gives it another"
        markup = self.tool_format.markers if self._template.writes_calls else PLAIN_MARKUP
        self._guard = ControlGuard(
            backend, "\n".join([self._template.source, self._template.tools_source, *markup])
        )
        self._anchors = _anchors(backend)
        self.stop_token_ids = self._find_stop_token_ids()

    @classmethod
    def load(
        cls, folder: Path, options: Mapping[str, object] | None = None, template: str | None = None
    ) -> ChatText:
        """The tokenizer and chat template that lie in a model's folder.

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
        except Exception as error:  # from a dozen loaders
            raise ModelUnavailable(
                f"no readable tokenizer in {folder}: {' '.join(str(error).split())[:400]}{_way_out(folder)}"
            ) from error
        if template is not None:
            tokenizer.chat_template = template
        return cls(tokenizer, options)

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
        """Whether tools and calls are written as words, because the template does not write them, or in no
        form that can be read.
        """
        return not self._template.writes_calls

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls: as its template does, or as it is told to."""
        return self._template.tool_format

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Special tokens that set calls and reasoning apart from words.

        What `detokenizer` has to keep for those who look for them.
        """
        markers = (*self.tool_format.markers, BEGIN_REASONING, END_REASONING)
        return frozenset(
            i for marker in markers if (i := self._backend.token_to_id(marker)) in self._special_ids
        )

    def first(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, tools: Tools | None = None
    ) -> list[int]:
        """Token ids of a conversation's first turn.

        Raises:
            InvalidRequest: the template refuses these messages, or a tool is none.
        """
        prompt = self._prepare(messages, tools)
        return self._guard.encode(
            self._render(prompt.turns, prompt.tools, add_generation_prompt), prompt.mark
        )

    def extend(
        self,
        log: Sequence[int],
        history: Sequence[Message],
        new: Sequence[Message],
        *,
        tools: Tools | None = None,
    ) -> Extension:
        """Append a turn to a token log.

        Args:
            log: ids that the model saw and sampled. Ends with the sampled ids of the last answer, with or
                without an end-of-turn token (an answer can end by length, abort or a stop string).
            history: the messages in the log; the last one is the assistant's answer, which may call tools.
            new: the messages to append, such as the user's next, or what tools answered.
            tools: the functions that the next answer may call. If they are not those that the log tells of,
                it is rewritten.

        Raises:
            InvalidRequest: the template refuses these messages, a tool is none, or the history does not end
                with an answer.
        """
        if not history or history[-1].role != "assistant":
            raise InvalidRequest(
                "a conversation goes on after an assistant's message, this history"
                + (f" ends with a {history[-1].role} message" if history else " is empty")
            )
        prompt = self._prepare([*history, *new], tools)
        whole = self._render(prompt.turns, prompt.tools)
        told = len(history)
        if not self._wander(log, tools):
            after = (
                self._after_calls(prompt, told, whole)
                if self._calls_natively(prompt, told)
                else self._after_answer(prompt, told, whole)
            )
            if after is not None and self._begins_with(log, prompt, whole):
                return Extension([*log, *self._closing(log, after, prompt.mark)], len(log), None)
        tokens = self._guard.encode(whole, prompt.mark)
        reused = _common_prefix(log, tokens)
        if reused == len(log):
            return Extension(tokens, reused, None)
        because = "the list of tools changed, so " if self._tools_changed(log, prompt, reused) else ""
        return Extension(
            tokens,
            reused,
            f"{because}the chat template now writes earlier turns differently from token {reused} on: "
            f"{len(log) - reused} of the"
            f" {len(log)} tokens in the log are void, and {len(tokens) - reused} of {len(tokens)} have to be "
            "computed",
        )

    @property
    def has_reasoning(self) -> bool:
        """The template knows that answers may begin with `<think>`."""
        return END_REASONING in self._template.source

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text that is no chat, control tokens in it included.

        It is its sender's whole prompt, nobody else speaks in it.
        """
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def settle(self) -> None:
        """Find out now what is otherwise found out when it is first asked for, by trying the template.

        Nothing of it is left for later.
        """
        _ = (
            self.marker_ids,
            self._tools_opening if self._template.moves_tools else None,
            self._begins_thinking,
            self.longest_token,
        )

    def prepare_twin(self) -> None:
        """Make now what prompts need in which a message spells out a control token.

        Takes about as long as loading the tokenizer.
        """
        self._guard.prepare()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def most_chars(self, max_tokens: int) -> int:
        """The most characters that so many tokens hold; what has more is refused without looking at it."""
        return max(FREE_CHARS, self.longest_token * max_tokens)

    def exceeds(self, messages: Iterable[Message], max_tokens: int, tools: Tools | None = None) -> bool:
        """Whether messages surely have more tokens than this, found out quickly however long they are.

        What a template may leave out does not count: white space around a message, and what was thought
        before an answer.
        """
        texts = [message.content.rpartition(END_REASONING)[2].strip() for message in messages]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
        return surely_exceed(
            texts, max_tokens, lambda text: len(self.encode_prompt(text, add_special_tokens=False))
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that goes on an answer.

        No control tokens come out of it, and no leading space goes in.
        """
        (mark,) = unused_marks([text], 1)
        return self._encode_inside(self._guard.hide(text, "assistant", mark), mark)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of text that we make an answer begin with, such as `force_prefix` gives.

        Markers in it become their tokens.

        For our own text only: what a user wrote goes through `encode_text`.
        """
        (mark,) = unused_marks([text], 1)
        return self._encode_inside(text, mark)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens written out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """The text of one id, a special token written out.

        Remembered: log-probabilities name the same tokens again and again.
        """
        if (found := self._token_texts.get(token_id)) is None:
            found = self._token_texts[token_id] = self.decode_all([token_id])
        return found

    def detokenizer(self, keep: Collection[int] = ()) -> Detokenizer:
        """A fresh incremental detokeniser for one answer.

        Args:
            keep: special tokens that are written out, such as `marker_ids` for `ToolCallParser` and
                `ReasoningSplitter`.
        """
        return Detokenizer(self.decode_all, self._special_ids.difference(keep), self._byte_ids)

    def reasoning_splitter(self) -> ReasoningSplitter:
        """What sets an answer's reasoning apart from its content.

        Passes all as content if the template knows no `</think>`.
        """
        return ReasoningSplitter(
            enabled=self.has_reasoning, inside=self.has_reasoning and self._begins_thinking
        )

    def count(self, messages: Sequence[Message], *, tools: Tools | None = None) -> int:
        """How many tokens these messages have as a prompt of their own."""
        return len(self.first(messages, tools=tools))

    def _render(self, turns: Sequence[Turn], tools: Tools | None, add_generation_prompt: bool = True) -> str:
        written = self._template.render(turns, tools, add_generation_prompt)
        if self.max_chars is not None and len(written) > self.max_chars:
            raise ContextLengthExceeded(
                f"the chat template makes {len(written)} characters of these messages, and the context holds "
                f"at most {self.max_chars}:"
                " shorten them, or start with a larger --max-context"
            )
        return written

    def _prepare(self, messages: Sequence[Message], tools: Tools | None) -> _Prompt:
        """Messages and tools as templates take them, control text that came with them swapped for
        placeholders.
        """
        if tools:
            tool_names(tools)
        turns = self._template.variables(messages)
        try:
            texts = [*texts_in(turns), *texts_in(tools or ())]
            for text in texts:
                text.encode()
            mark, hole = unused_marks(texts, 2)

            def hide(text: str) -> str:
                return self._guard.hide(text, "tool", mark)

            for turn in turns:
                turn["content"] = self._guard.hide(turn["content"], turn["role"], mark)
                for key in ("tool_calls", "tool_call_id", "name"):
                    if key in turn:
                        turn[key] = map_texts(turn[key], hide)
            return _Prompt(turns, map_texts(tools, hide) if tools else None, mark, hole)
        except RecursionError:
            raise InvalidRequest(
                "a tool or a call's arguments are nested too deeply to be written: flatten them"
            ) from None
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"a message or tool holds half a character (a lone surrogate, {error.object[error.start]!r})"
            ) from None

    def _after_answer(self, prompt: _Prompt, told: int, whole: str) -> str | None:
        """The rendering's text behind the last answer; None if the log cannot go on with it.

        That is so if the template now writes what came before, or the answer itself, in another way.
        """
        turns, last = prompt.turns, prompt.turns[told - 1]
        with_hole = [*turns[: told - 1], {"role": "assistant", "content": prompt.hole}, *turns[told:]]
        before, _, after = self._render(with_hole, prompt.tools).partition(prompt.hole)
        asked = self._render(turns[: told - 1], prompt.tools) if told > 1 else before
        if asked.rstrip() == before.rstrip() and _fills(whole, before, after, self._template.said(last)):
            return after
        return None

    def _calls_natively(self, prompt: _Prompt, told: int) -> bool:
        return self._template.writes_calls and "tool_calls" in prompt.turns[told - 1]

    def _after_calls(self, prompt: _Prompt, told: int, whole: str) -> str | None:
        """The same behind an answer with calls, whose form is the template's own.

        Nothing can be put in their place.

        The answer is what a chat that ends with it has more than one that asks for it, up to the token that
        ends a turn. The model need not have written it letter by letter like that, but it must be there.
        """
        turns, last = prompt.turns, prompt.turns[told - 1]
        asked = self._render(turns[: told - 1], prompt.tools).rstrip() if told > 1 else ""
        ended = self._render(turns[:told], prompt.tools, add_generation_prompt=False).rstrip()
        if not (ended.startswith(asked) and whole.startswith(ended)):
            return None
        answer = ended[len(asked) :]
        ends = (answer.rfind(token) for i in self.stop_token_ids if (token := self._backend.id_to_token(i)))
        answer = answer[: max((end for end in ends if end >= 0), default=len(answer))]
        if not _in_order(
            answer, [last["content"], *(call["function"]["name"] for call in last["tool_calls"])]
        ):
            return None
        return whole[len(asked) + len(answer) :]

    def _closing(self, log: Sequence[int], after: str, mark: str) -> list[int]:
        """Ids that end the last answer and begin the next one.

        The end-of-turn token only if the log lacks it.
        """
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

    def _begins_with(self, log: Sequence[int], prompt: _Prompt, whole: str) -> bool:
        """Whether the log begins as this template would begin it now, up to the first answer.

        Not so when the system prompt depends on the date, or the log was made with another template or other
        tools.
        """
        head = _head(prompt.turns)
        if not head:
            return True
        text = self._render(head, prompt.tools)
        shared = text[: _common_prefix(text, whole)]
        ids = self._guard.encode(shared, prompt.mark)
        return _common_prefix(ids, log) >= len(ids) - 1  # the last one may have merged with what followed

    def _wander(self, log: Sequence[int], tools: Tools | None) -> bool:
        """Whether a list of tools stands, or stood, somewhere behind the first answer, where nothing else
        would notice a change of it.
        """
        return self._template.moves_tools and (bool(tools) or self._tools_opening in log)

    def _tools_changed(self, log: Sequence[int], prompt: _Prompt, reused: int) -> bool:
        """Whether the log parts from the new rendering after `reused` tokens because it tells of other tools."""
        head = _head(prompt.turns)
        if not head:
            return False
        try:
            with_tools = self._guard.encode(self._render(head, prompt.tools or PROBE_TOOLS), prompt.mark)
            without = self._guard.encode(self._render(head, None), prompt.mark)
        except InvalidRequest:  # of a rendering that nobody asked for
            return False
        if _common_prefix(without if prompt.tools else with_tools, log) > reused:
            return True  # the log had none, or it has some and there are none now
        start = _common_prefix(with_tools, without)
        stop = len(with_tools) - _common_prefix(with_tools[:start:-1], without[:start:-1])
        return prompt.tools is not None and start < reused < stop

    @cached_property
    def _tools_opening(self) -> int | None:
        """The control token that a list of tools begins with."""
        bare, told = (
            self._backend.encode(text, add_special_tokens=False).ids for text in self._template.probe_tools()
        )
        opening = told[_common_prefix(bare, told)]
        return opening if opening in self._backend.get_added_tokens_decoder() else None

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
            return frozenset(ids)  # an unusual template: its users bring their own stop tokens
        closing = self._guard.leading_control(rendered.rpartition(hole)[2])
        if closing is not None and closing[1] in self._special_ids:
            ids.add(closing[1])
        call = self._backend.encode(self._template.probe_call(), add_special_tokens=False).ids
        ids.update(
            [i for i in call if i in self._special_ids][-1:]
        )  # calls may end with a token of their own
        return frozenset(ids)


def _way_out(folder: Path) -> str:
    """What helps where a tokenizer cannot be read."""
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        return ". It has tokenizer.model only: `pip install sentencepiece tiktoken` may read it, or put the model's tokenizer.json beside it"
    return ". Fetch its tokenizer.json and tokenizer_config.json again"


def _head(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The messages before the first answer."""
    return turns[
        : next((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    ]


def _fills(whole: str, before: str, after: str, answer: str) -> bool:
    """Whether `whole` is `before`, the answer and `after`.

    White space does not count: the log has the answer's own.
    """
    if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
        return False
    return whole[len(before) : len(whole) - len(after)].split() == answer.split()


def _in_order(text: str, parts: Sequence[str]) -> bool:
    """Whether the parts follow each other in the text. White space does not count."""
    rest = "".join(text.split())
    for part in ("".join(part.split()) for part in parts):
        at = rest.find(part)
        if at < 0:
            return False
        rest = rest[at + len(part) :]
    return True


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of the longest common beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _anchors(backend: Any) -> list[tuple[str, list[int]]]:
    """Beginnings, with their ids, after which a tokenizer takes text as it is.

    The first that does not merge with it serves.

    A special token is enough for most. Older sentencepiece conversions put a space even after that one, but
    not after a character from no script at all, which they spell in bytes.
    """
    added = sorted(backend.get_added_tokens_decoder().items())
    special = next(
        (str(token.content) for _, token in added if token.special and token.content and not token.rstrip),
        None,
    )
    if special is None:
        return []
    puts_space = (
        backend.decode(backend.encode(special + "x", add_special_tokens=False).ids, skip_special_tokens=False)
        != special + "x"
    )
    texts = [special + "\ue000", special] if puts_space else [special]
    return [(text, list(backend.encode(text, add_special_tokens=False).ids)) for text in texts]


def _bos_text(tokenizer: Any, backend: Any) -> str:
    """The beginning-of-sequence token's text, if the tokenizer begins plain text with it."""
    ids = backend.encode("a", add_special_tokens=True).ids
    return (
        str(tokenizer.bos_token)
        if tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]
        else ""
    )


def _byte_fallback_ids(backend: Any) -> frozenset[int]:
    """Ids of the tokens that stand for single bytes, `<0x00>` to `<0xFF>`, where the decoder knows them as
    such.
    """
    if "ByteFallback" not in repr(backend.decoder):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)
