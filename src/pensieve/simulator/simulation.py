"""Users who converse with the real scheduler and cache in virtual time. Knows scripts, requests and the
clock; never costs or policies.

Sole owner of time here, as the engine is where a model computes. One loop: send what is due, schedule, run,
commit.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from pensieve.core.checks import check
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.receipt import Receipt
from pensieve.core.request import Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.errors import PensieveError
from pensieve.simulator.goal import Lateness, Waiting
from pensieve.simulator.records import RequestRecord
from pensieve.simulator.worker import CostWorker, VirtualClock
from pensieve.workloads.conversations import text_length_tokens
from pensieve.workloads.scripts import Piece, Player, Script

NAMESPACE = "simulation"
_STEPS_A_LOOK = 256  # between two checks whether to report progress or to give up


@dataclass(slots=True)
class _Conversation:
    """A script being played. Every token of a turn has the same made-up id, one that no other conversation
    uses.
    """

    script: Script
    name: str  # unique within the simulation
    player: Iterator[Script]  # its user's next conversations
    token_id: int
    runs: list[tuple[int, int]] = field(
        default_factory=list
    )  # (token id, tokens) of each turn of the history
    turn: int = 0  # the next to be sent, or the one under way


@dataclass(slots=True)
class _InFlight:
    conversation: _Conversation
    sent_s: float


class Simulation:
    """One run. `play` once; then `records`."""

    def __init__(
        self, scheduler: Scheduler, worker: CostWorker, clock: VirtualClock, *, debug: bool = False
    ) -> None:
        """`debug`: verify every cache invariant after every step."""
        self.records: list[RequestRecord] = []
        self.num_in_system_s = 0.0  # integral over time of the requests sent and not finished (Little's law)
        self._scheduler, self._worker, self._clock, self._debug = scheduler, worker, clock, debug
        self._due: list[tuple[float, int, _Conversation]] = []
        self._order = itertools.count()
        self._ids = itertools.count(1)
        self._names: dict[str, int] = {}
        self._shared: dict[tuple[str, ...], int] = {}  # token ids of shared beginnings
        self._in_flight: dict[str, _InFlight] = {}
        self._playing: dict[str, _Conversation] = {}  # by name, from their first turn to their last answer

    def play(
        self,
        players: Iterable[Player],
        *,
        window_s: tuple[float, float] | None = None,
        tell: Callable[[float, int], None] | None = None,
        lateness: Lateness | None = None,
    ) -> bool:
        """Play all users to the end, or until every request sent in the window has ended.

        Returns False if the run was given up before.

        Args:
            players: by their start, ascending; may be endless if there is a window.
            window_s: the span that is measured. Users go on until it is over and its requests have ended.
            tell: called now and then with the virtual time and the number of requests finished.
            lateness: asked now and then; when it says that its goal is missed for certain, there is no need
                to go on.
        """
        coming = iter(players)
        upcoming = next(coming, None)
        clock = self._clock
        steps = 0
        while True:
            while upcoming is not None and upcoming.start_s <= clock.now_s:
                self._begin(upcoming)
                upcoming = next(coming, None)
            while self._due and self._due[0][0] <= clock.now_s:
                due_s, _, conversation = heapq.heappop(self._due)
                self._send(conversation, due_s)
            if window_s is not None and clock.now_s >= window_s[1] and not self._owes(window_s):
                return True
            ran = (
                0
                if self._debug
                else self._run_steadily(_STEPS_A_LOOK - steps % _STEPS_A_LOOK, upcoming, window_s)
            )
            if not ran and not self._run_step(upcoming):
                return True
            steps += ran or 1
            if steps % _STEPS_A_LOOK == 0:
                if tell is not None:
                    tell(clock.now_s, len(self.records))
                if lateness is not None and lateness.missed(self.records, self._waiting(), clock.now_s):
                    return False

    def next_use_s(self, name: str, now_s: float) -> float:
        """When a conversation whose turn ends now sends its next: what a clairvoyant policy knows. Infinity:
        never.
        """
        conversation = self._playing[name]
        if conversation.turn + 1 >= len(conversation.script.turns):
            return math.inf
        return conversation.script.turns[conversation.turn + 1].due_after(now_s)

    # -- steps

    def _run_step(self, upcoming: Player | None) -> bool:
        """Schedule, run, commit; if there is nothing to do, move on to when there is. False: there never will
        be.
        """
        scheduler, worker, clock = self._scheduler, self._worker, self._clock
        plan = scheduler.schedule(clock.now_s)
        if plan.is_empty:
            next_s = self._next_s(upcoming)
            if next_s is None:
                assert not scheduler.requests, f"{len(scheduler.requests)} requests wait for ever"
                return False
            self._move_on(max(next_s, clock.now_s))
        events = scheduler.commit(plan, self._run(plan), clock.now_s)
        for request in events.finished:
            self._take_answer(request)
        if committed_s := worker.committed_s(plan, len(events.finished)):
            self._move_on(clock.now_s + committed_s)
        if self._debug:
            check(scheduler.cache)
        return True

    def _run_steadily(self, most: int, upcoming: Player | None, window_s: tuple[float, float] | None) -> int:
        """Run steps that only decode, if such come next, `most` or until something else is due; returns how
        many.
        """
        steady = self._scheduler.steady_steps()
        if steady is None:
            return 0
        worker, clock = self._worker, self._clock
        dues = [
            self._due[0][0] if self._due else math.inf,
            upcoming.start_s if upcoming is not None else math.inf,
        ]
        if window_s is not None and clock.now_s < window_s[1]:
            dues.append(window_s[1])
        until_s = min(dues)
        results: list[StepResult] = []
        for index in range(min(most, steady.count)):
            plan = steady.plan(index)
            results.append(self._run(plan))
            if committed_s := worker.committed_s(plan, 0):
                self._move_on(clock.now_s + committed_s)
            if results[-1].copies_done or clock.now_s >= until_s:
                break
        self._scheduler.commit_steady(steady, results, clock.now_s)
        return len(results)

    def _run(self, plan: StepPlan) -> StepResult:
        before_s = self._clock.now_s
        result = self._worker.run(plan)
        self.num_in_system_s += len(self._in_flight) * (self._clock.now_s - before_s)
        return result

    def _next_s(self, upcoming: Player | None) -> float | None:
        """When something happens next, if no step is planned before."""
        times = [
            self._worker.next_settled_s,
            self._due[0][0] if self._due else None,
            upcoming.start_s if upcoming is not None else None,
        ]
        return min((at for at in times if at is not None), default=None)

    def _move_on(self, to_s: float) -> None:
        self.num_in_system_s += len(self._in_flight) * (to_s - self._clock.now_s)
        self._clock.advance(to_s)

    def _owes(self, window_s: tuple[float, float]) -> bool:
        return any(window_s[0] <= flight.sent_s < window_s[1] for flight in self._in_flight.values())

    def _waiting(self) -> Iterator[Waiting]:
        for request_id, flight in self._in_flight.items():
            turn = flight.conversation.script.turns[flight.conversation.turn]
            receipt = self._scheduler.requests[request_id].receipt
            yield Waiting(flight.sent_s, turn.output_tokens, receipt.first_token_s)

    # -- users

    def _begin(self, player: Player) -> None:
        self._next_script(iter(player.scripts), player.start_s)

    def _next_script(self, scripts: Iterator[Script], now_s: float) -> None:
        script = next(scripts, None)
        if script is None:
            return
        count = self._names.get(script.name, 0)
        self._names[script.name] = count + 1
        name = script.name if not count else f"{script.name}#{count}"
        self._plan_turn(_Conversation(script, name, scripts, next(self._ids)), now_s)

    def _plan_turn(self, conversation: _Conversation, now_s: float) -> None:
        due_s = conversation.script.turns[conversation.turn].due_after(now_s)
        heapq.heappush(self._due, (due_s, next(self._order), conversation))

    def _send(self, conversation: _Conversation, now_s: float) -> None:
        turn = conversation.script.turns[conversation.turn]
        if turn.keep_turns is not None and turn.keep_turns < len(conversation.runs):
            del conversation.runs[turn.keep_turns :]
            conversation.token_id = next(self._ids)  # what comes now is another text than what was cut off
        tokens = self._prefix(conversation.script)
        for token_id, count in conversation.runs:
            tokens += [token_id] * count
        history = len(tokens) if conversation.turn else 0
        tokens += [conversation.token_id] * turn.message_tokens
        request_id = f"{conversation.name}/{conversation.turn}"
        self._playing[conversation.name] = conversation
        sampling = SamplingParams(max_new_tokens=turn.output_tokens)
        self._in_flight[request_id] = _InFlight(conversation, now_s)
        self.num_in_system_s += self._clock.now_s - now_s  # (sent while a step was under way)
        try:
            self._scheduler.submit(
                request_id, NAMESPACE, conversation.name, tuple(tokens), history, sampling, now_s
            )
        except PensieveError as error:
            self._refused(request_id, len(tokens), history, error.message)

    def _prefix(self, script: Script) -> list[int]:
        """What several conversations begin with: the same piece after the same pieces is the same tokens."""
        pieces = list(script.prefix)
        if script.system:
            pieces.append(Piece(script.system, text_length_tokens(script.system)))
        tokens: list[int] = []
        path: tuple[str, ...] = ()
        for piece in pieces:
            path = (*path, piece.name)
            if path not in self._shared:
                self._shared[path] = next(self._ids)
            tokens += [self._shared[path]] * piece.tokens
        return tokens

    # -- answers

    def _take_answer(self, request: Request) -> None:
        flight = self._in_flight.pop(request.request_id)
        conversation = flight.conversation
        receipt = replace(request.receipt, misses=())
        self._note(flight, request.history_tokens, receipt, request.error)
        message = conversation.script.turns[conversation.turn].message_tokens
        conversation.runs.append((conversation.token_id, message + request.num_output))
        self._go_on(conversation)

    def _refused(self, request_id: str, prompt: int, history: int, why: str) -> None:
        """A turn that the scheduler does not take ends its conversation: its user has nothing to answer to."""
        flight = self._in_flight.pop(request_id)
        conversation, now_s = flight.conversation, self._clock.now_s
        self._note(flight, history, Receipt(prompt), why)
        del self._playing[conversation.name]
        self._next_script(conversation.player, now_s)

    def _note(self, flight: _InFlight, history: int, receipt: Receipt, error: str | None) -> None:
        name, turn = flight.conversation.name, flight.conversation.turn
        self.records.append(
            RequestRecord(name, turn, flight.sent_s, self._clock.now_s, history, receipt, error)
        )

    def _go_on(self, conversation: _Conversation) -> None:
        conversation.turn += 1
        if conversation.turn < len(conversation.script.turns):
            self._plan_turn(conversation, self._clock.now_s)
        else:
            del self._playing[conversation.name]
            self._next_script(conversation.player, self._clock.now_s)
