"""Conversations that arrive whatever a server does, played against anything that answers. Knows token counts and seconds; never an engine or a tensor.

The paper's load (§6): Poisson arrivals, a turn sent only after the previous answer plus an exponential think time; throughput against normalized
latency, which is a request's whole time over its output tokens. Standard library and Pensieve's workloads only: servers with an environment of
their own are driven by it, too.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from peers.curve import Crossing, Point, throughput_at

from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.scripts import Player, Script, ScriptTurn, fitting, open_loop

# From one rate to the next while the crossing is not between two of them: larger where latency is nearly that of an idle system.
STEP, LONG_STEP, NEARLY_IDLE = 1.6, 2.2, 0.65


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long conversations are: means of the paper's table 2 for ShareGPT."""

    mean_turns: float = 5.56
    mean_input: float = 37.77
    mean_output: float = 204.58
    spread_input: float = 1.2  # of the logarithm
    spread_output: float = 0.8
    most_turns: int = 20
    most_tokens: int = 1024  # of one message or answer

    def script(self, index: int, think: ThinkTime, seed: int, max_context: int) -> Script:
        """Conversation 0, 1, 2, ...: geometric in turns, lognormal in tokens; cut where its context would end."""
        rng = random.Random(f"lengths/{seed}/{index}")
        turns = 1
        while turns < self.most_turns and rng.random() > 1 / self.mean_turns:
            turns += 1
        made = tuple(
            ScriptTurn(
                self._tokens(rng, self.mean_input, self.spread_input),
                self._tokens(rng, self.mean_output, self.spread_output),
                think.draw_s(seed, index, turn),
            )
            for turn in range(turns)
        )
        script = fitting(Script(str(index), made), max_context)
        return script or Script(str(index), (ScriptTurn(8, 8),))

    def _tokens(self, rng: random.Random, mean: float, spread: float) -> int:
        drawn = rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)
        return max(1, min(self.most_tokens, round(drawn)))


@dataclass(frozen=True, slots=True)
class Load:
    """How a system is loaded."""

    lengths: Lengths
    think_s: float  # mean, exponential
    point_s: float  # of arrivals, at one rate
    window_s: float  # the last so many of them count
    drain_s: float  # after them, for requests under way
    unloaded_turns: int  # played one after the other to know the latency of an idle system
    max_context: int
    vocab: int
    seed: int
    num_points: int = 3

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Load:
        return cls(**(told | {"lengths": Lengths(**told["lengths"])}))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def scripts(self, count: int) -> list[Script]:
        """The first so many conversations."""
        think = ThinkTime(self.think_s, exponential=True)
        return [self.lengths.script(index, think, self.seed, self.max_context) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    tokens: tuple[int, ...]
    first_s: float | None  # from sending to the first token
    cached_tokens: int  # of the prompt, not computed again
    from_below: int = 0  # of these, from a lower tier
    recomputed: int = 0  # of the history, computed again


class Server(Protocol):
    """Anything that answers."""

    async def ask(self, conversation: str, prompt: tuple[int, ...], history: int, new: int) -> Answer:
        """Exactly `new` tokens after `prompt`, of which an earlier turn put `history` before the model."""
        ...

    async def clear(self) -> None:
        """Stop what is under way and forget every conversation."""
        ...


@dataclass(slots=True)
class Sent:
    """One request, and what became of it."""

    conversation: str
    turn: int
    sent_s: float  # from the beginning of the run
    prompt_tokens: int
    history_tokens: int
    asked_tokens: int
    done_s: float | None = None
    answer: Answer | None = None

    def normalized_s(self, end_s: float) -> float:
        """Seconds a token; of a request under way, what it has come to already."""
        return ((end_s if self.done_s is None else self.done_s) - self.sent_s) / self.asked_tokens


@dataclass(slots=True)
class Run:
    """What happened."""

    sent: list[Sent] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    end_s: float = 0.0


async def play(
    players: Sequence[Player], server: Server, load: Load, *, until_s: float, drain_s: float, label: str = ""
) -> Run:
    """Play scripts from their starts; after `until_s` nothing is sent any more, after `drain_s` more nothing is waited for."""
    run, begin = Run(), time.monotonic()

    async def converse(player: Player) -> None:
        await asyncio.sleep(player.start_s)
        (script,) = player.scripts
        name = f"{label}/{script.name}"
        rng = random.Random(f"words/{load.seed}/{script.name}")
        log: tuple[int, ...] = ()
        for number, turn in enumerate(script.turns):
            if time.monotonic() - begin + turn.think_s >= until_s:
                return
            await asyncio.sleep(turn.think_s)
            now_s = time.monotonic() - begin
            prompt = log + tuple(rng.randrange(load.vocab) for _ in range(turn.message_tokens))
            sent = Sent(name, number, now_s, len(prompt), len(log), turn.output_tokens)
            run.sent.append(sent)
            try:
                sent.answer = await server.ask(name, prompt, len(log), turn.output_tokens)
            except (
                Exception
            ) as error:  # one conversation ends; what went wrong is in the report, and fails the run
                run.errors.append(f"{type(error).__name__}: {error}")
                return
            sent.done_s = time.monotonic() - begin
            if len(sent.answer.tokens) != turn.output_tokens:
                run.errors.append(
                    f"{len(sent.answer.tokens)} tokens came back, {turn.output_tokens} were asked for"
                )
            log = prompt + sent.answer.tokens

    tasks = [asyncio.create_task(converse(player)) for player in players]
    _, late = await asyncio.wait(tasks, timeout=until_s + drain_s)
    run.end_s = time.monotonic() - begin
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return run


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the others lies, linear between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values have no percentile")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def figures(run: Run, window: tuple[float, float]) -> dict[str, Any]:
    """What a run came to.

    Args:
        run: with at least one request sent within the window.
        window: seconds from the run's beginning. Throughput counts what was answered in it; latency is of what was sent in it, requests that were
            never answered included with what they had waited.

    Raises:
        ValueError: nothing was sent in the window.
    """
    start_s, stop_s = window
    sent = [request for request in run.sent if start_s <= request.sent_s < stop_s]
    if not sent:
        raise ValueError(f"nothing was sent between {start_s:g} and {stop_s:g} s")
    answered = [
        request for request in run.sent if request.done_s is not None and start_s <= request.done_s < stop_s
    ]
    normalized = [1e3 * request.normalized_s(run.end_s) for request in sent]
    firsts = [1e3 * r.answer.first_s for r in sent if r.answer is not None and r.answer.first_s is not None]
    answers = [r.answer for r in sent if r.answer is not None]
    history = sum(r.history_tokens for r in sent if r.answer is not None)

    return {
        "requests_per_s": len(answered) / (stop_s - start_s),
        "output_tokens_per_s": sum(request.asked_tokens for request in answered) / (stop_s - start_s),
        "sent": len(sent), "unanswered": sum(request.done_s is None for request in sent),
        "normalized_ms": statistics.mean(normalized), "normalized_p50_ms": percentile(normalized, 0.5),
        "normalized_p90_ms": percentile(normalized, 0.9), "ttft_p50_ms": percentile(firsts, 0.5) if firsts else None, "ttft_p90_ms": percentile(firsts, 0.9) if firsts else None,
        "prompt_tokens": sum(r.prompt_tokens for r in sent if r.answer is not None), "history_tokens": history,
        "cached_tokens": sum(answer.cached_tokens for answer in answers), "from_below": sum(answer.from_below for answer in answers),
        "recomputed": sum(answer.recomputed for answer in answers),
    }  # fmt: skip


def next_rate(points: Sequence[tuple[float, float]], limit: float, first: float) -> float:
    """The rate to try next so that a latency limit comes to lie between two points, and these close together.

    Args:
        points: (rate, latency) so far, in any order.
        limit: of the latency.
        first: the rate to begin with.
    """
    below = max(((rate, latency) for rate, latency in points if latency <= limit), default=None)
    above = min((rate for rate, latency in points if latency > limit), default=None)
    if below is None:
        return first if above is None else above / STEP
    rate, latency = below
    if above is not None and rate < above:
        return math.sqrt(rate * above)
    return rate * (LONG_STEP if latency <= NEARLY_IDLE * limit else STEP)


def crossing_of(points: Sequence[dict[str, Any]], limit_ms: float) -> Crossing:
    """Requests a second at which the normalized latency reaches a limit; `points` as `sweep` tells them."""
    ordered = sorted(points, key=lambda point: float(point["rate"]))
    return throughput_at(
        [Point(point["requests_per_s"], point["normalized_ms"]) for point in ordered], limit_ms
    )


def ratio_of(ours: Crossing, theirs: Crossing) -> tuple[float, str]:
    """How much more is answered, and what the ratio is if a sweep did not reach the limit: "", "at least", "at most" or "unknown"."""
    ratio = ours.requests_per_s / theirs.requests_per_s if theirs.requests_per_s else math.inf
    bounds = {ours.bound, {"at least": "at most", "at most": "at least", None: None}[theirs.bound]} - {None}
    if len(bounds) > 1:
        return ratio, "unknown"
    return ratio, next((bound for bound in bounds if bound), "")


async def sweep(
    server: Server,
    load: Load,
    *,
    limit_ms: float | None,
    first_rate: float,
    say: Callable[[str], None],
    left_s: Callable[[], float],
) -> dict[str, Any]:
    """Latency unloaded, then at `num_points` rates around the one where it reaches a limit.

    Args:
        server: cleared between rates.
        load: what it gets.
        limit_ms: of the normalized latency; None: twice this system's own unloaded one.
        first_rate: turns a second to begin with.
        say: told each point.
        left_s: how long the run may still take; a point that would not fit is left out.
    """
    alone = load.scripts(load.unloaded_turns)
    quiet = [replace(s, turns=tuple(replace(turn, think_s=0.0) for turn in s.turns[:4])) for s in alone]
    run = Run()
    for script in quiet:  # one after the other
        if len(run.sent) >= load.unloaded_turns:
            break
        part = await play(
            [Player(0.0, (script,))], server, load, until_s=math.inf, drain_s=0.0, label="alone"
        )
        run.sent += part.sent
        run.errors += part.errors
    unloaded_ms = 1e3 * statistics.mean(
        request.normalized_s(math.inf) for request in run.sent if request.done_s is not None
    )
    first_answer = next((list(r.answer.tokens) for r in run.sent if r.answer is not None), [])
    await server.clear()
    limit_ms = limit_ms or 2 * unloaded_ms
    say(f"unloaded {unloaded_ms:.2f} ms a token; the limit is {limit_ms:.2f}")
    points: list[dict[str, Any]] = []
    errors, left_out = list(run.errors), 0
    for _ in range(load.num_points):
        if left_s() < load.point_s + load.drain_s:
            left_out += 1
            continue
        rate = next_rate([(point["rate"], point["normalized_ms"]) for point in points], limit_ms, first_rate)
        count = math.ceil(2 * rate * load.point_s / load.lengths.mean_turns) + 20
        players = open_loop(load.scripts(count), load.lengths.mean_turns, rate, load.point_s, seed=load.seed)
        played = await play(
            players, server, load, until_s=load.point_s, drain_s=load.drain_s, label=f"{rate:.3f}"
        )
        await server.clear()
        point = {"rate": rate} | figures(played, (load.point_s - load.window_s, load.point_s))
        points.append(point)
        errors += played.errors
        say(
            f"at {rate:.2f} a second: {point['requests_per_s']:.2f} answered, {point['normalized_ms']:.2f} ms a token, "
            f"{point['cached_tokens'] / max(1, point['history_tokens']):.0%} of the history cached"
        )
    told: dict[str, Any] = {
        "unloaded_ms": unloaded_ms, "limit_ms": limit_ms, "points": sorted(points, key=lambda point: float(point["rate"])),
        "errors": errors[:20], "num_errors": len(errors), "points_left_out": left_out, "first_answer": first_answer,
    }  # fmt: skip
    if points:
        told["crossing"] = asdict(crossing_of(points, limit_ms))
    return told
