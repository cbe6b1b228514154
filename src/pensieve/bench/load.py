"""Plays users against a server and keeps what each request took. Knows scripts, answers and this process's clock; never HTTP or statistics.

A closed loop's user sends its next turn after the answer and its think time; in an open one conversations arrive whatever
the server does. Both are in the players (`workloads.scripts`). Like any stateless client, a user sends the whole
history with every turn, with the server's own answers in it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pensieve.bench.chat_client import Asked, ChatClient, Messages
from pensieve.bench.probe import Target
from pensieve.workloads.prompts import PromptWriter
from pensieve.workloads.scripts import Player, Script, ScriptTurn

_TICK_S = 0.001
SHOW_EVERY_S = 0.5  # what is shown costs the machine that is measured


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times in seconds; `due_s` and `submitted_s` since the run began, the others since the request was sent."""

    conversation: int  # within the run
    turn: int
    due_s: float  # when the user wanted to send it
    submitted_s: float
    ttft_s: float | None  # to the first piece with something in it; None = there was none
    latency_s: float  # to the end of the stream
    gaps_s: tuple[float, ...]  # between pieces
    prompt_tokens: int | None  # as the server counts; None = not told
    cached_tokens: int | None
    output_tokens: int | None  # pieces, where the server counts nothing
    error: str | None = None  # "code: words" of a request that failed

    @property
    def ok(self) -> bool:
        """It was answered as asked."""
        return self.error is None

    @property
    def normalized_s(self) -> float | None:
        """Latency over output tokens (paper, evaluation)."""
        return self.latency_s / self.output_tokens if self.output_tokens else None

    @property
    def inter_token_s(self) -> float | None:
        """Mean time between tokens: a piece may hold several, so the gaps between pieces are not it."""
        if self.output_tokens is None or self.output_tokens < 2 or not self.gaps_s:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Everything that was asked in one run, in the order in which it was sent."""

    rate: float | None  # requests a second asked for; None: a closed loop, or a trace's own times
    records: tuple[RequestRecord, ...]
    wall_s: float  # from the first request to the end of the last
    client_cpu_s: float  # of this process
    turns_not_sent: int  # of conversations that ended at a failed turn
    arrivals_s: float | None = None  # for how long conversations arrived; None: a closed loop


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    num_turns: int
    sent: int = 0
    ended: int = 0
    failed: int = 0
    skipped: int = 0  # turns that will not be sent
    output_tokens: int = 0

    @property
    def under_way(self) -> int:
        """Requests without an end yet."""
        return self.sent - self.ended


class LoadListener(Protocol):
    """Is told how a run goes, at most every `SHOW_EVERY_S`."""

    def begin(self, label: str, progress: Progress) -> None:
        """A run begins."""
        ...

    def show(self, progress: Progress) -> None:
        """So far."""
        ...

    def end(self, progress: Progress) -> None:
        """It is over."""
        ...


class LoadDriver:
    """Plays players, one run after the other."""

    def __init__(
        self, chat: ChatClient, target: Target, writer: PromptWriter, listener: LoadListener
    ) -> None:
        """`target` is what was found out about the server behind `chat`; `writer` writes the texts of turns that have none."""
        self._chat = chat
        self._target = target
        self._writer = writer
        self._listener = listener

    async def run(
        self,
        players: Sequence[Player],
        *,
        label: str,
        rate: float | None = None,
        arrivals_s: float | None = None,
    ) -> LoadRun:
        """Play everybody to the end.

        Args:
            players: the users.
            label: of this run; its words are drawn by it, so two runs of one driver share none.
            rate: kept in the result.
            arrivals_s: kept in the result.
        """
        stage = _Stage(
            self._chat,
            self._target,
            self._writer,
            label,
            Progress(sum(player.num_turns for player in players)),
        )
        self._listener.begin(label, stage.progress)
        shown = asyncio.ensure_future(self._show(stage.progress))
        cpu_s = time.process_time()
        stage.begin()
        try:
            async with asyncio.TaskGroup() as group:
                first = 0
                for player in players:
                    group.create_task(stage.play(player, first))
                    first += len(player.scripts)
        finally:
            shown.cancel()
            self._listener.end(stage.progress)
        cpu_s = time.process_time() - cpu_s
        records = tuple(sorted(stage.records, key=lambda record: record.submitted_s))
        wall_s = max((r.submitted_s + r.latency_s for r in records), default=0.0) - min(
            (r.submitted_s for r in records), default=0.0
        )
        return LoadRun(rate, records, wall_s, cpu_s, stage.progress.skipped, arrivals_s)

    async def _show(self, progress: Progress) -> None:
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            self._listener.show(progress)


class _Stage:
    """One run under way."""

    def __init__(
        self, chat: ChatClient, target: Target, writer: PromptWriter, label: str, progress: Progress
    ) -> None:
        self.progress = progress
        self.records: list[RequestRecord] = []
        self._chat, self._target, self._writer, self._label = chat, target, writer, label
        self._begun_s = 0.0

    def begin(self) -> None:
        self._begun_s = time.perf_counter()

    async def play(self, player: Player, first: int) -> None:
        """One user, whose conversations are numbered from `first`."""
        free_s = player.start_s
        for conversation, script in enumerate(player.scripts, start=first):
            free_s = await self._converse(conversation, script, free_s)

    async def _converse(self, conversation: int, script: Script, free_s: float) -> float:
        """One conversation from `free_s` on, to its end or its first failure. When that was."""
        system = self._system(script)
        head: Messages = [{"role": "system", "content": system}] if system else []
        said: Messages = []  # a question and an answer for each turn
        for index, turn in enumerate(script.turns):
            due_s = turn.due_after(free_s)
            await self._until(due_s)
            if turn.keep_turns is not None:
                del said[2 * turn.keep_turns :]
            question = {"role": "user", "content": self._text(script, index, turn)}
            self.progress.sent += 1
            asked = await self._chat.ask([*head, *said, question], turn.output_tokens)
            record = self._record(conversation, index, turn, due_s, asked)
            self.records.append(record)
            self.progress.ended += 1
            self.progress.output_tokens += record.output_tokens or 0
            free_s = self._now_s()
            if not record.ok:
                self.progress.failed += 1
                self.progress.skipped += len(script.turns) - index - 1
                break
            said += [question, {"role": "assistant", "content": asked.answer.text}]
        return free_s

    def _system(self, script: Script) -> str | None:
        """What stands before the first message: the same words for every conversation of the run that begins with the same pieces."""
        texts = [script.system] if script.system else []
        for piece in script.prefix:
            words = max(1, round(piece.tokens / self._target.tokens_per_word))
            texts.append(self._writer.write(f"{self._label}/begin/{piece.name}", words))
        return "\n".join(texts) or None

    def _text(self, script: Script, index: int, turn: ScriptTurn) -> str:
        if turn.text is not None:
            return turn.text
        words = max(1, round(turn.message_tokens / self._target.tokens_per_word))
        return self._writer.write(f"{self._label}/{script.name}/{index}", words)

    def _record(
        self, conversation: int, index: int, turn: ScriptTurn, due_s: float, asked: Asked
    ) -> RequestRecord:
        answer = asked.answer
        times_s = answer.piece_times_s
        error = None
        if asked.failure is not None:
            error = f"{asked.failure.code}: {asked.failure.message}"
        elif self._target.fixed_lengths:
            error = _wrong_length(turn.output_tokens, asked)
        return RequestRecord(
            conversation=conversation,
            turn=index,
            due_s=due_s,
            submitted_s=asked.submitted_s - self._begun_s,
            ttft_s=times_s[0] - asked.submitted_s if times_s else None,
            latency_s=asked.ended_s - asked.submitted_s,
            gaps_s=tuple(after_s - before_s for before_s, after_s in itertools.pairwise(times_s)),
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens if answer.output_tokens is not None else answer.num_pieces,
            error=error,
        )

    async def _until(self, due_s: float) -> None:
        """Wait for a time of the run. An event loop may wake up a little early: its clock has coarse ticks."""
        while (left_s := due_s - self._now_s()) > 0:
            await asyncio.sleep(max(left_s, _TICK_S))

    def _now_s(self) -> float:
        return time.perf_counter() - self._begun_s


def _wrong_length(num_tokens: int, asked: Asked) -> str | None:
    """What is wrong with an answer that was to have `num_tokens` tokens."""
    answer = asked.answer
    if not answer.num_pieces:
        return f"empty_answer: {num_tokens} tokens were asked for and the answer has no text (finish_reason {answer.finish_reason})"
    if answer.output_tokens is None:
        return f"no_usage: the stream ended without a count of its tokens, {num_tokens} were asked for"
    if answer.output_tokens != num_tokens:
        return f"wrong_length: {num_tokens} tokens were asked for, the answer has {answer.output_tokens} (finish_reason {answer.finish_reason})"
    return None
