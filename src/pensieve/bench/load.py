"""Puts a load on a server and records each request. Knows scripts and answers; never HTTP or statistics.

A closed loop's user sends its next turn after the answer and its think time; in an open loop conversations
arrive independently of the server. The players (`workloads.scripts`) decide which.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pensieve.bench.chat_client import Asked, ChatClient, Messages
from pensieve.bench.driver import Driver, PlayedUser, RunListener, TurnEnd
from pensieve.bench.probe import Target
from pensieve.workloads.prompts import PromptWriter
from pensieve.workloads.scripts import Player, Script


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One request. Times in seconds: `due_s` and `submitted_s` since the run began, the others since it was
    sent.
    """

    conversation: int  # within the run
    turn: int
    due_s: float  # when the user wanted to send it
    submitted_s: float
    ttft_s: float | None  # to the first piece with content; None if there was none
    latency_s: float  # to the end of the stream
    gaps_s: tuple[float, ...]  # between pieces
    prompt_tokens: int | None  # by the server's count; None if not reported
    cached_tokens: int | None
    output_tokens: int | None  # pieces, if the server reports no count
    error: str | None = None  # "code: words" of a request that failed

    @property
    def ok(self) -> bool:
        """It was answered, with the length asked for."""
        return self.error is None

    @property
    def normalized_s(self) -> float | None:
        """Latency over output tokens (paper, evaluation)."""
        return self.latency_s / self.output_tokens if self.output_tokens else None

    @property
    def inter_token_s(self) -> float | None:
        """Mean time between tokens. Not the mean gap between pieces: a piece may hold several tokens."""
        if self.output_tokens is None or self.output_tokens < 2 or not self.gaps_s:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All requests of one run, in the order in which they were sent."""

    rate: float | None  # planned requests a second; None: a closed loop, or a trace's own times
    records: tuple[LoadRecord, ...]
    wall_s: float  # from the first request to the end of the last
    client_cpu_s: float  # of this process
    turns_not_sent: int  # because an earlier turn of their conversation failed
    arrivals_s: float | None = None  # for how long conversations arrived; None: a closed loop


class LoadDriver:
    """Plays scripted users against one server, one run after the other."""

    def __init__(
        self, chat: ChatClient, target: Target, writer: PromptWriter, listener: RunListener | None = None
    ) -> None:
        """`target` is what the probe found out about the server behind `chat`; `writer` makes texts for turns
        without one.
        """
        self._chat, self._target, self._writer, self._listener = chat, target, writer, listener

    async def run(
        self,
        players: Sequence[Player],
        *,
        label: str,
        rate: float | None = None,
        arrivals_s: float | None = None,
    ) -> LoadRun:
        """Play all users to the end.

        Args:
            players: the users.
            label: of this run; it seeds the words, so two runs of one driver share none.
            rate: kept in the result.
            arrivals_s: kept in the result.
        """
        driver = Driver(label, sum(player.num_turns for player in players), self._listener)
        stage = _Stage(self._chat, self._target, self._writer, label, driver)
        firsts = itertools.accumulate((len(player.scripts) for player in players), initial=0)
        users = [
            PlayedUser(player.start_s, _talks(stage, first, player.scripts))
            for first, player in zip(firsts, players, strict=False)
        ]
        cpu_s = time.process_time()
        await driver.play(users)
        cpu_s = time.process_time() - cpu_s
        records = tuple(sorted(stage.records, key=lambda record: record.submitted_s))
        wall_s = max((r.submitted_s + r.latency_s for r in records), default=0.0) - min(
            (r.submitted_s for r in records), default=0.0
        )
        return LoadRun(rate, records, wall_s, cpu_s, driver.progress.skipped, arrivals_s)


@dataclass(slots=True)
class _Stage:
    """What all conversations of a run share, and the records they leave."""

    chat: ChatClient
    target: Target
    writer: PromptWriter
    label: str
    driver: Driver
    records: list[LoadRecord] = field(default_factory=list)

    def write(self, name: str, num_tokens: float) -> str:
        """A text of about so many tokens; the same name in the same run gives the same text."""
        return self.writer.write(
            f"{self.label}/{name}", max(1, round(num_tokens / self.target.tokens_per_word))
        )


def _talks(stage: _Stage, first: int, scripts: Iterable[Script]) -> Iterator[_Talk]:
    """A user's conversations, numbered from `first`. Each is made when it begins, so that no history is kept
    longer.
    """
    return (_Talk(stage, number, script) for number, script in enumerate(scripts, start=first))


class _Talk:
    """A `PlayedConversation` of a script. Like any stateless client it sends the whole history with every
    turn.
    """

    def __init__(self, stage: _Stage, number: int, script: Script) -> None:
        self._stage, self._number, self._script = stage, number, script
        self._head: Messages | None = None  # the system prompt; written with the first turn
        self._said: Messages = []  # a question and an answer for each turn

    @property
    def num_turns(self) -> int:
        return len(self._script.turns)

    def due_s(self, turn: int, free_s: float) -> float:
        return self._script.turns[turn].due_after(free_s)

    async def take_turn(self, turn: int, due_s: float) -> TurnEnd:
        stage, script = self._stage, self._script.turns[turn]
        if self._head is None:
            self._head = self._system()
        if script.keep_turns is not None:
            del self._said[2 * script.keep_turns :]
        text = script.text
        if text is None:
            text = stage.write(f"{self._script.name}/{turn}", script.message_tokens)
        question = {"role": "user", "content": text}
        asked = await stage.chat.ask([*self._head, *self._said, question], script.output_tokens)
        record = self._record(turn, due_s, asked)
        stage.records.append(record)
        self._said += [question, {"role": "assistant", "content": asked.answer.text}]
        return TurnEnd(
            stage.driver.now_s(), record.output_tokens or 0, goes_on=record.ok, failed=not record.ok
        )

    def _system(self) -> Messages:
        """The system prompt. Conversations of a run that begin with the same pieces get the same words."""
        texts = [self._script.system] if self._script.system else []
        texts += [self._stage.write(f"begin/{piece.name}", piece.tokens) for piece in self._script.prefix]
        return [{"role": "system", "content": "\n".join(texts)}] if texts else []

    def _record(self, turn: int, due_s: float, asked: Asked) -> LoadRecord:
        answer, num_tokens = asked.answer, self._script.turns[turn].output_tokens
        times_s = answer.piece_times_s
        error = None
        if asked.failure is not None:
            error = f"{asked.failure.code}: {asked.failure.message}"
        elif self._stage.target.fixed_lengths:
            error = _wrong_length(num_tokens, asked)
        return LoadRecord(
            conversation=self._number,
            turn=turn,
            due_s=due_s,
            submitted_s=self._stage.driver.since_begin_s(asked.submitted_s),
            ttft_s=times_s[0] - asked.submitted_s if times_s else None,
            latency_s=asked.ended_s - asked.submitted_s,
            gaps_s=tuple(after_s - before_s for before_s, after_s in itertools.pairwise(times_s)),
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens if answer.output_tokens is not None else answer.num_pieces,
            error=error,
        )


def _wrong_length(num_tokens: int, asked: Asked) -> str | None:
    """What is wrong with an answer that should have `num_tokens` tokens; None if nothing is."""
    answer = asked.answer
    if not answer.num_pieces:
        return f"empty_answer: {num_tokens} tokens were asked for and the answer has no text (finish_reason {answer.finish_reason})"
    if answer.output_tokens is None:
        return f"no_usage: the stream ended without a count of its tokens, {num_tokens} were asked for"
    if answer.output_tokens != num_tokens:
        return f"wrong_length: {num_tokens} tokens were asked for, the answer has {answer.output_tokens} (finish_reason {answer.finish_reason})"
    return None
