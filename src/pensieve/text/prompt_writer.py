"""Writes messages as token ids, append-only.

Knows templates, control tokens and token logs; never stop strings or tools' formats.

The token log is the truth: the ids that a conversation's model saw and sampled. A new turn appends its own
ids to the log and changes nothing before them, so everything cached stays valid, and so do answers whose
sampled ids differ from the ids that encoding their text would give. An answer that calls tools is such an
answer: the log keeps it as the model wrote it.

Some templates forbid that. They render an earlier turn differently once a later one is there: they strip an
answer's reasoning, move the system prompt to the newest message, or write today's date or a changed list of
tools. Then the log is rendered anew, and a sentence says what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pensieve.errors import ContextLengthExceeded, InvalidRequest
from pensieve.message import Message
from pensieve.text.control import ControlGuard, unused_marks
from pensieve.text.template import PROBE_TOOLS, PromptTemplate, Turn
from pensieve.text.tool_format import Tools, map_texts, texts_in, tool_names


@dataclass(frozen=True, slots=True)
class Extension:
    """A token log with a new turn at its end."""

    tokens: list[int]  # the whole log, ready for the model to answer
    reused_tokens: int  # leading tokens that are those of the old log
    # Where the log was rewritten and what must be prefilled again, in a sentence; None if it was only
    # appended to.
    rewritten: str | None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Messages and tools with placeholders for control tokens."""

    turns: list[Turn]
    tools: Tools | None
    mark: str  # begins every placeholder
    hole: str  # a character that occurs nowhere


class PromptWriter:
    """Renders chats with one template and one tokenizer.

    Args:
        backend: a `tokenizers.Tokenizer`.
        template: renders messages and tools.
        guard: encodes renderings.
        stop_token_ids: ids that end an answer.

    Attributes:
        max_chars: the most characters of a rendering; longer ones are refused before they are tokenized. None
            if unlimited.
    """

    def __init__(
        self, backend: Any, template: PromptTemplate, guard: ControlGuard, stop_token_ids: frozenset[int]
    ) -> None:
        self._backend, self._template, self._guard = backend, template, guard
        self._stop_token_ids = stop_token_ids
        self._anchors = _anchors(backend)
        self.max_chars: int | None = None

    def settle(self) -> None:
        """Find out now what is otherwise found out on first use, by trying the template."""
        _ = self._tools_opening if self._template.moves_tools else None

    def first(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, tools: Tools | None = None
    ) -> list[int]:
        """Token ids of a conversation's first turn.

        Raises:
            InvalidRequest: the template refuses these messages, or a tool is malformed.
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
            new: the messages to append, such as the user's next message or the tools' results.
            tools: the functions that the next answer may call. The log is rewritten if it names others.

        Raises:
            InvalidRequest: the template refuses these messages, a tool is malformed, or the history does
                not end with an answer.
        """
        if not history or history[-1].role != "assistant":
            raise InvalidRequest(
                "a conversation goes on after an assistant's message, this history"
                + (f" ends with a {history[-1].role} message" if history else " is empty")
            )
        prompt = self._prepare([*history, *new], tools)
        whole = self._render(prompt.turns, prompt.tools)
        num_told = len(history)
        if not self._tools_may_move(log, tools):
            after = (
                self._after_calls(prompt, num_told, whole)
                if self._calls_natively(prompt, num_told)
                else self._after_answer(prompt, num_told, whole)
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
            f"{len(log) - reused} of the {len(log)} tokens in the log are void, and {len(tokens) - reused} "
            "of "
            f"{len(tokens)} have to be computed",
        )

    def _render(self, turns: Sequence[Turn], tools: Tools | None, add_generation_prompt: bool = True) -> str:
        written = self._template.render(turns, tools, add_generation_prompt)
        if self.max_chars is not None and len(written) > self.max_chars:
            raise ContextLengthExceeded(
                f"the chat template makes {len(written)} characters of these messages, and the context holds "
                f"at most {self.max_chars}: shorten them, or start with a larger --max-context"
            )
        return written

    def _prepare(self, messages: Sequence[Message], tools: Tools | None) -> _Prompt:
        """Messages and tools as templates take them, with placeholders for their control text."""
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

    def _after_answer(self, prompt: _Prompt, num_told: int, whole: str) -> str | None:
        """The rendering's text after the last answer.

        None if the template now writes that answer, or a message before it, differently: the log cannot be
        appended to.
        """
        turns, last = prompt.turns, prompt.turns[num_told - 1]
        with_hole = [*turns[: num_told - 1], {"role": "assistant", "content": prompt.hole}, *turns[num_told:]]
        before, _, after = self._render(with_hole, prompt.tools).partition(prompt.hole)
        asked = self._render(turns[: num_told - 1], prompt.tools) if num_told > 1 else before
        if asked.rstrip() == before.rstrip() and _fills(whole, before, after, self._template.said(last)):
            return after
        return None

    def _calls_natively(self, prompt: _Prompt, num_told: int) -> bool:
        return self._template.writes_calls and "tool_calls" in prompt.turns[num_told - 1]

    def _after_calls(self, prompt: _Prompt, num_told: int, whole: str) -> str | None:
        """The same after an answer with calls.

        Only the template can write calls: no placeholder can stand for them. The answer is the difference
        between the rendering that ends with it and the rendering that asks for it, up to the end-of-turn
        token. The log may spell it differently, but the rendering must contain its text and calls.
        """
        turns, last = prompt.turns, prompt.turns[num_told - 1]
        asked = self._render(turns[: num_told - 1], prompt.tools).rstrip() if num_told > 1 else ""
        ended = self._render(turns[:num_told], prompt.tools, add_generation_prompt=False).rstrip()
        if not (ended.startswith(asked) and whole.startswith(ended)):
            return None
        answer = ended[len(asked) :]
        ends = (answer.rfind(token) for i in self._stop_token_ids if (token := self._backend.id_to_token(i)))
        answer = answer[: max((end for end in ends if end >= 0), default=len(answer))]
        if not _in_order(
            answer, [last["content"], *(call["function"]["name"] for call in last["tool_calls"])]
        ):
            return None
        return whole[len(asked) + len(answer) :]

    def _closing(self, log: Sequence[int], after: str, mark: str) -> list[int]:
        """Ids that end the last answer and begin the next one.

        The end-of-turn token is left out if the log has it already.
        """
        closing = self._guard.leading_control(after)
        if closing is None or not log or log[-1] != closing[1]:
            return self.encode_inside(after, mark)
        ids = self._guard.encode(after.lstrip(), mark)
        return ids[1:] if ids[:1] == [closing[1]] else ids

    def encode_inside(self, text: str, mark: str) -> list[int]:
        """Encode text from the middle of a prompt, where a tokenizer must not add a leading space."""
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

        It does not if the system prompt holds a date, or if the log was made with another template or other
        tools.
        """
        head = _head(prompt.turns)
        if not head:
            return True
        text = self._render(head, prompt.tools)
        shared = text[: _common_prefix(text, whole)]
        ids = self._guard.encode(shared, prompt.mark)
        return _common_prefix(ids, log) >= len(ids) - 1  # the last one may have merged with what followed

    def _tools_may_move(self, log: Sequence[int], tools: Tools | None) -> bool:
        """Whether a list of tools is or was after the first answer.

        No other check would see a change of it there.
        """
        return self._template.moves_tools and (bool(tools) or self._tools_opening in log)

    def _tools_changed(self, log: Sequence[int], prompt: _Prompt, reused: int) -> bool:
        """Whether the log differs from the new rendering after `reused` tokens because of other tools."""
        head = _head(prompt.turns)
        if not head:
            return False
        try:
            with_tools = self._guard.encode(self._render(head, prompt.tools or PROBE_TOOLS), prompt.mark)
            without = self._guard.encode(self._render(head, None), prompt.mark)
        except InvalidRequest:  # the template refuses this probe
            return False
        if _common_prefix(without if prompt.tools else with_tools, log) > reused:
            return True  # one of the two lists tools, the other does not
        start = _common_prefix(with_tools, without)
        stop = len(with_tools) - _common_prefix(with_tools[:start:-1], without[:start:-1])
        return prompt.tools is not None and start < reused < stop

    @cached_property
    def _tools_opening(self) -> int | None:
        """The control token that a list of tools begins with; None if it is no control token."""
        without, with_tools = (
            self._backend.encode(text, add_special_tokens=False).ids for text in self._template.probe_tools()
        )
        opening = with_tools[_common_prefix(without, with_tools)]
        return opening if opening in self._backend.get_added_tokens_decoder() else None


def _head(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The messages before the first answer."""
    return turns[
        : next((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    ]


def _fills(whole: str, before: str, after: str, answer: str) -> bool:
    """Whether `whole` is `before`, the answer and `after`.

    White space does not count: the log keeps the answer's.
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
    """Texts with their ids, after which a tokenizer adds no space to what follows.

    The first one that does not merge with the text is used. A special token is enough for most tokenizers.
    Older sentencepiece conversions put a space even after that, but not after a private-use character, which
    they encode byte by byte.
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
