"""Does the simulator tell what the engine does? The same users meet the engine with a real model, and the simulator with this machine's profile.

    python benchmarks/validate_simulator.py [--users 8,24] [--rounds 2] [--clock wall|cpu] [--threads N] [--out FILE]

The profile (`pensieve profile`) is measured first. Then, for each number of users and each system (stateful over two tiers that together hold
a third of all histories; `gpu-only`, what leaves the first tier is dropped; stateless, with both tiers' memory as one): the engine,
stepped in this thread, with prompts as drawn token ids and answers of fixed lengths; and the simulator, with the very same scripts. Nobody is
waited for: when there is nothing to do, the clock is set to when the next user speaks.

`--clock cpu` counts this process's processor time instead of the wall's: on a machine that others use as well (with `--threads 1`: threads that
wait for each other spin). Now and then in each run, and in the profile's, a prompt and a batch of decodes are timed on another worker: their ratio, the
drift, says how much slower the machine was in that run than when it was profiled. Both are reported: the simulation with the profile as it was measured, and with
its seconds times the drift.

Prints JSON: throughput, latencies and tokens by source of both, and a verdict on three bounds: throughput within 15 %, each source's share of
prompt tokens within 3 points, the same ranking of the systems (but for those whose real throughputs lie within 3 % of each other).

`--again FILE,FILE` simulates anew what earlier results ran for real, each run with its own round's profile: for changes of the simulator.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import commit

from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Event, Failed, Finished, Submit
from pensieve.runtime.loading import LoadedModel, load_model
from pensieve.runtime.local import make_engine
from pensieve.runtime.options import GB, Options
from pensieve.runtime.profiling import document, load_or_measure
from pensieve.simulator.case import Case, Machine, find_system, run_case
from pensieve.simulator.measured import MeasuredMachine, read_machine
from pensieve.simulator.records import RequestRecord, Summary, summarize
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions
from pensieve.workloads.scripts import Player, Script

CHUNK = 32
STEPS_A_SAMPLE = 50  # between two looks at how fast the machine is
MAX_THROUGHPUT_ERROR, MAX_SHARE_POINTS = 0.15, 3.0
NEAR = (
    0.94,
    0.97,
    1.03,
    1.06,
)  # machines nearly as fast: how far figures depend on who happens to come first
TIE = 0.03  # systems whose real throughputs differ by less have no order
TIERS_SHARE = 1 / 3  # of all histories at their end, in both tiers together
GPU_SHARE = 2 / 3  # of that
SYSTEMS = {"stateful": "pensieve", "gpu-only": "gpu-only", "stateless": "stateless"}  # here: in the simulator
SOURCES = ("gpu", "cpu", "recomputed", "new")


class Clock:
    """Seconds in which there is something to do."""

    def __init__(self, base: Callable[[], float]) -> None:
        self._base, self._skipped_s = base, 0.0

    def __call__(self) -> float:
        return self._base() + self._skipped_s

    def leave_out(self, work: Callable[[], None]) -> None:
        """Do something that does not count."""
        before = self._base()
        work()
        self._skipped_s -= self._base() - before

    def skip_to(self, at_s: float) -> None:
        self._skipped_s += max(0.0, at_s - self())


@dataclass(slots=True)
class Conversation:
    """A script being played."""

    script: Script
    name: str
    rng: random.Random
    log: list[int] = field(default_factory=list)  # tokens before the model so far
    turn: int = 0
    sent_s: float = 0.0


@dataclass(slots=True)
class Steps:
    """What the engine's steps took, and what the cost model says that they take."""

    count: int = 0
    took_s: float = 0.0
    predicted_s: float = 0.0
    by_kind: dict[str, list[float]] = field(default_factory=dict)  # [steps, seconds taken, seconds predicted]

    def add(self, spans: Sequence[Span], took_s: float, predicted_s: float) -> None:
        tokens = sum(span.stop - span.start for span in spans)
        kind = (
            "decodes"
            if tokens == len(spans)
            else "prompts of up to 128"
            if tokens <= 128
            else "prompts of more"
        )
        for index, value in enumerate((1.0, took_s, predicted_s)):
            self.by_kind.setdefault(kind, [0.0, 0.0, 0.0])[index] += value
        self.count += 1
        self.took_s += took_s
        self.predicted_s += predicted_s


class RealRun:
    """The engine and its users, in one thread."""

    def __init__(
        self,
        options: Options,
        loaded: LoadedModel,
        retain: bool,
        clock: Clock,
        machine: MeasuredMachine,
        seed: int,
    ) -> None:
        self._clock, self._seed, self._vocabulary = clock, seed, loaded.shape.vocab_size
        made = make_engine(
            options,
            replace(loaded, gpu_cache_gb=options.gpu_cache_gb or 0.0),
            emit=self._emit,
            retain=retain,
            clock=clock,
        )
        self.sizes, self.cost_source = made.sizes, made.cost_source
        self._engine = made.engine
        self._due: list[tuple[float, int, Conversation]] = []
        self._order = itertools.count()
        self._in_flight: dict[str, Conversation] = {}
        self.records: list[RequestRecord] = []
        self.steps = Steps()
        self.stepping_s = 0.0  # in the engine's steps that computed, the worker's share included
        self._watch(machine)

    def _watch(self, machine: MeasuredMachine) -> None:
        worker: Any = self._engine._worker
        run, cost, clock = worker.run, machine.cost(), self._clock

        def timed(plan: StepPlan) -> StepResult:
            begin = clock()
            result: StepResult = run(plan)
            if plan.spans:
                self.steps.add(plan.spans, clock() - begin, cost.step_s(plan.spans))
            return result

        worker.run = timed

    def play(self, players: Sequence[Player], sample: Callable[[], None]) -> None:
        """To the end; `sample` is called now and then, beside the clock."""
        engine, clock = self._engine, self._clock
        self._begin_s = clock()
        for player in players:
            (script,) = player.scripts
            conversation = Conversation(script, script.name, random.Random(f"{self._seed}/{script.name}"))
            self._plan_turn(conversation, self._begin_s + player.start_s)
        while self._due or self._in_flight:
            while self._due and self._due[0][0] <= clock():
                due_s, _, conversation = heapq.heappop(self._due)
                self._send(conversation, due_s)
            begin_s, count = clock(), self.steps.count
            busy = engine.step()
            if self.steps.count > count:
                self.stepping_s += clock() - begin_s
                if self.steps.count % STEPS_A_SAMPLE == 0:
                    clock.leave_out(sample)
            if not busy:
                if self._in_flight or not self._due:  # a copy is under way
                    time.sleep(2e-5)
                else:
                    clock.skip_to(self._due[0][0])

    def close(self) -> None:
        self._engine.close()

    def _plan_turn(self, conversation: Conversation, now_s: float) -> None:
        due_s = now_s + conversation.script.turns[conversation.turn].think_s
        heapq.heappush(self._due, (due_s, next(self._order), conversation))

    def _send(self, conversation: Conversation, due_s: float) -> None:
        turn = conversation.script.turns[conversation.turn]
        history = len(conversation.log)
        conversation.log += [conversation.rng.randrange(self._vocabulary) for _ in range(turn.message_tokens)]
        conversation.sent_s = due_s
        request_id = f"{conversation.name}/{conversation.turn}"
        self._in_flight[request_id] = conversation
        sampling = SamplingParams(max_new_tokens=turn.output_tokens)
        self._engine.post(
            Submit(
                request_id, conversation.name, "validate", tuple(conversation.log), history, sampling, due_s
            )
        )

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                raise SystemExit(f"request {event.request_id} failed: {event.message}")
            if isinstance(event, Finished):
                self._take(event)

    def _take(self, event: Finished) -> None:
        conversation, got = self._in_flight.pop(event.request_id), event.receipt
        sent_s = conversation.sent_s - self._begin_s
        history = got.prompt_tokens - got.new_tokens
        name, turn, end_s = conversation.name, conversation.turn, sent_s + got.total_s
        self.records.append(RequestRecord(name, turn, sent_s, end_s, history, got))
        conversation.log += event.output
        conversation.turn += 1
        if conversation.turn < len(conversation.script.turns):
            self._plan_turn(conversation, self._clock())


class Calibration:
    """A prompt and a batch of decodes, timed: how fast the machine is now."""

    PROMPT, BATCH, CONTEXT, DECODES = 128, 8, 512, 4

    def __init__(self, model: CausalModel, clock: Callable[[], float]) -> None:
        self._clock = clock
        chunks = self.CONTEXT // CHUNK
        self._worker = ModelWorker(model, (TierConfig("gpu", self.BATCH * chunks),), CHUNK)
        self._num_steps = 0
        self._samples: dict[str, list[float]] = {}
        names = [f"calibration {row}" for row in range(self.BATCH)]
        self._run(
            (),
            tuple(RequestStart(name, SamplingParams(), ()) for name in names),
            tuple(
                BlockTableUpdate(name, 0, tuple(range(row * chunks, (row + 1) * chunks)))
                for row, name in enumerate(names)
            ),
        )
        ids = tuple(position * 7919 % model.shape.vocab_size for position in range(self.PROMPT))
        self._plans = {
            "prompt": (Span(names[0], 0, self.PROMPT, ids, True),),
            "decodes": tuple(Span(name, self.CONTEXT - 1, self.CONTEXT, ids[:1], True) for name in names),
        }

    def sample(self) -> None:
        """Time each of them now."""
        for name, spans in self._plans.items():
            times = []
            for _ in range(1 if name == "prompt" else self.DECODES):
                begin = self._clock()
                self._run(spans)
                times.append(self._clock() - begin)
            self._samples.setdefault(name, []).append(statistics.median(times))

    def take(self) -> dict[str, float]:
        """Seconds of each, medians over the samples since the last call."""
        found = {name: statistics.median(seconds) for name, seconds in self._samples.items()}
        self._samples.clear()
        return found

    def _run(
        self,
        spans: tuple[Span, ...],
        started: tuple[RequestStart, ...] = (),
        tables: tuple[BlockTableUpdate, ...] = (),
    ) -> None:
        result = self._worker.run(StepPlan(self._num_steps, spans, (), (), started, tables, (), ()))
        assert result.forward_error is None, result.forward_error
        self._num_steps += 1


def drift_of(then: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """How much longer each calibration takes now than then."""
    return {name: now[name] / then[name] for name in then}


def slowed(machine: MeasuredMachine, factor: float) -> MeasuredMachine:
    """A machine on which everything takes `factor` times as long."""
    profile = machine.profile

    def scaled(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((count, seconds * factor) for count, seconds in points)

    return replace(
        machine,
        profile=replace(
            profile,
            step_points=scaled(profile.step_points),
            answer_points=scaled(profile.answer_points),
            decode_token_s=profile.decode_token_s * factor,
            chunk_token_s=profile.chunk_token_s * factor,
            plan_step_s=profile.plan_step_s * factor,
            plan_request_s=profile.plan_request_s * factor,
            commit_step_s=profile.commit_step_s * factor,
            commit_request_s=profile.commit_request_s * factor,
            commit_end_s=profile.commit_end_s * factor,
            copy_bytes_per_s={name: rate / factor for name, rate in profile.copy_bytes_per_s.items()},
        ),
    )


def figures(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """What is compared of a run."""
    end_s = max(record.finished_s for record in records)
    begin_s = min(record.sent_s for record in records)
    summary: Summary = summarize(records, begin_s, end_s + 1e-9)
    prompt = sum(record.receipt.prompt_tokens for record in records)
    by_source = {
        name: sum(getattr(record.receipt, f"{name}_tokens") for record in records) / prompt
        for name in SOURCES
    }
    return {
        "requests": summary.sent, "failed": summary.failed, "seconds": end_s - begin_s, "requests_per_s": summary.finished_per_s,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "normalized_ms": {"mean": 1e3 * summary.normalized_s.mean, "p90": 1e3 * summary.normalized_s.p90},
        "ttft_ms": {"mean": 1e3 * summary.ttft_s.mean, "p90": 1e3 * summary.ttft_s.p90},
        "tokens_by_source": by_source, "suspensions": summary.suspensions,
    }  # fmt: skip


def compare(simulated: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """Simulated over real, and points of difference."""
    return {
        "requests_per_s": simulated["requests_per_s"] / real["requests_per_s"],
        "normalized_mean": simulated["normalized_ms"]["mean"] / real["normalized_ms"]["mean"],
        "normalized_p90": simulated["normalized_ms"]["p90"] / real["normalized_ms"]["p90"],
        "ttft_mean": simulated["ttft_ms"]["mean"] / real["ttft_ms"]["mean"],
        "ttft_p90": simulated["ttft_ms"]["p90"] / real["ttft_ms"]["p90"],
        "source_points": {
            name: 100 * (simulated["tokens_by_source"][name] - real["tokens_by_source"][name])
            for name in SOURCES
        },
    }


@dataclass(frozen=True, slots=True)
class Setting:
    """One number of users, and what it takes on both sides."""

    load: LoadOptions
    gpu_slots: int
    cpu_slots: int
    chunk_bytes: int

    def gigabytes(self, slots: int) -> float:
        """A quarter of a chunk more than so many, so that rounding takes none away."""
        return (slots + 0.25) * self.chunk_bytes / GB if slots else 0.0

    def options(self, base: Options, system: str) -> Options:
        cpu = 0 if system == "gpu-only" else self.cpu_slots
        return replace(base, gpu_cache_gb=self.gigabytes(self.gpu_slots), cpu_cache_gb=self.gigabytes(cpu))

    def machine(self, measured: MeasuredMachine, system: str) -> Machine:
        gpu, cpu = self.gigabytes(self.gpu_slots), self.gigabytes(self.cpu_slots)
        return Machine(
            measured.model,
            gpu_cache_gb=gpu + cpu if system == "stateless" else gpu,
            cpu_cache_gb=cpu,
            measured=measured,
        )


def simulate(setting: Setting, system: str, measured: MeasuredMachine, options: Options) -> dict[str, Any]:
    case = Case(
        setting.machine(measured, system), setting.load, SYSTEMS[system], chunk_tokens=CHUNK, max_batch_tokens=options.batch_tokens,
        max_running=options.max_running, admission=options.admission, step_ms=options.step_ms, max_context=min(measured.shape.max_positions, setting.gpu_slots * CHUNK),
    )  # fmt: skip
    outcome = run_case(case, keep_records=True)
    return figures(outcome.records) | {"steps": outcome.num_steps, "busy_share": outcome.busy_share}


def put_together(
    setting: Setting,
    system: str,
    machine: MeasuredMachine,
    base: Options,
    real: dict[str, Any],
    drift: dict[str, float],
    calibrations: Any,
) -> dict[str, Any]:
    """A real run beside its simulations."""
    simulated = simulate(setting, system, machine, base)
    at_drift = simulate(setting, system, slowed(machine, statistics.fmean(drift.values())), base)
    near = [simulate(setting, system, slowed(machine, speed), base) for speed in NEAR]
    return {
        "real": real, "simulated": simulated, "simulated_at_drift": at_drift, "drift": drift, "calibrations": calibrations,
        "simulated_near": [{name: other[name] for name in ("requests_per_s", "tokens_by_source")} for other in near],
        "compared": compare(simulated, real), "compared_at_drift": compare(at_drift, real),
    }  # fmt: skip


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number, however deep."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {
        name: mean_of([run[name] for run in runs])
        if isinstance(runs[0][name], dict)
        else statistics.fmean(run[name] for run in runs)
        for name in names
    }


def judge(results: dict[int, dict[str, Any]], which: str) -> dict[str, Any]:
    """The three bounds, over the mean of all rounds."""
    verdict: dict[str, Any] = {}
    errors: dict[str, float] = {}
    points: dict[str, float] = {}
    rankings: dict[str, dict[str, Any]] = {}
    for users, systems in results.items():
        for system, found in systems.items():
            compared = found[which]
            errors[f"{users} users, {system}"] = compared["requests_per_s"] - 1
            points[f"{users} users, {system}"] = max(compared["source_points"].values(), key=abs)
        real = sorted(systems, key=lambda name: -systems[name]["real_mean"]["requests_per_s"])
        simulated = sorted(systems, key=lambda name: -systems[name]["simulated"]["requests_per_s"])
        rate = {name: systems[name]["real_mean"]["requests_per_s"] for name in systems}
        pairs = list(itertools.combinations(real, 2))  # (faster, slower)
        ties = [pair for pair in pairs if rate[pair[0]] < (1 + TIE) * rate[pair[1]]]
        same = all(
            simulated.index(fast) < simulated.index(slow) for fast, slow in pairs if (fast, slow) not in ties
        )
        rankings[f"{users} users"] = {"real": real, "simulated": simulated, "ties": ties, "same": same}
    verdict["throughput"] = {
        "bound": MAX_THROUGHPUT_ERROR,
        "errors": errors,
        "held": max(map(abs, errors.values())) <= MAX_THROUGHPUT_ERROR,
    }
    verdict["sources"] = {
        "bound_points": MAX_SHARE_POINTS,
        "worst": points,
        "held": max(map(abs, points.values())) <= MAX_SHARE_POINTS,
    }
    verdict["ranking"] = {**rankings, "held": all(ranking["same"] for ranking in rankings.values())}
    return verdict


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_real(
    setting: Setting,
    system: str,
    base: Options,
    loaded: LoadedModel,
    clock: Clock,
    machine: MeasuredMachine,
    calibrate: Calibration,
) -> tuple[dict[str, Any], dict[str, float]]:
    """One real run, and the calibrations in it."""
    load_before = load_average()
    calibrate.sample()
    run = RealRun(
        setting.options(base, system), loaded, system != "stateless", clock, machine, setting.load.seed
    )
    assert "measurement" in run.cost_source, run.cost_source
    expected = setting.machine(machine, system).tiers(find_system(SYSTEMS[system]), CHUNK)
    assert run.sizes.tiers == expected, (run.sizes.tiers, expected)
    assert run.sizes.max_context == min(machine.shape.max_positions, setting.gpu_slots * CHUNK)
    begun = time.perf_counter()
    run.play(setting.load.plan()[0].players, calibrate.sample)
    took = time.perf_counter() - begun
    run.close()
    steps = run.steps
    found = figures(run.records) | {
        "steps": steps.count,
        "worker_s": steps.took_s,
        "worker_predicted_s": steps.predicted_s,
        "beside_worker_ms_a_step": 1e3 * (run.stepping_s - steps.took_s) / steps.count,
        "taken_over_predicted": {
            kind: took / predicted for kind, (_, took, predicted) in steps.by_kind.items()
        },
        "steps_by_kind": {kind: count for kind, (count, _, _) in steps.by_kind.items()},
        "wall_s": took,
        "load_average_before": load_before[0],
        "load_average_after": load_average()[0],
    }
    calibrate.sample()
    return found, calibrate.take()


def settings_of(arguments: argparse.Namespace, token_bytes: int, seed: int) -> dict[int, Setting]:
    chunk_bytes = token_bytes * CHUNK
    think = ThinkTime.parse(arguments.think)
    tokens = arguments.first + (arguments.turns - 1) * arguments.new + arguments.turns * arguments.output
    found = {}
    for users in map(int, arguments.users.split(",")):
        load = LoadOptions(
            users=users, turns=arguments.turns, new_tokens=arguments.new, first_tokens=arguments.first, output_tokens=arguments.output,
            think=think, starts_s=think.mean_s, seed=seed,
        )  # fmt: skip
        total = round(users * -(-tokens // CHUNK) * TIERS_SHARE)
        gpu = round(total * GPU_SHARE)
        found[users] = Setting(load, gpu, total - gpu, chunk_bytes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--users", default="8,24")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument(
        "--rounds", type=int, default=2, help="each with a profile and think times of its own"
    )
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--new", type=int, default=100, help="tokens of a message")
    parser.add_argument("--first", type=int, default=300, help="tokens of the first message")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--think", default="exp:2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    parser.add_argument(
        "--again", default=None, help="results of earlier runs, several with commas: nothing is run for real"
    )
    arguments = parser.parse_args()
    if arguments.again is not None:
        earlier = [json.loads(Path(name).read_text()) for name in arguments.again.split(",")]
        text = json.dumps(report_of(arguments, simulate_again(earlier)))
        if arguments.out is not None:
            arguments.out.write_text(text + "\n")
        print(text)
        return
    base_clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    base = Options(model=arguments.model, threads=arguments.threads)
    loaded = load_model(base, must_talk=False, say=say, with_text=False)
    systems = arguments.systems.split(",")
    clock = Clock(base_clock)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PENSIEVE_CACHE"] = (
            folder  # (the model is loaded) only this run's engine finds its profile there
        )
        calibrate = Calibration(loaded.model, base_clock)
        rounds: list[dict[str, Any]] = []
        for round_ in range(arguments.rounds):
            rounds.append(run_round(round_, arguments, base, loaded, clock, base_clock, calibrate, systems))
            text = json.dumps(report_of(arguments, rounds))
            if arguments.out is not None:
                arguments.out.write_text(text + "\n")
    print(text)


def simulate_again(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of some reports with their real runs as they are and all else anew."""
    rounds = []
    for report in reports:
        config = argparse.Namespace(**report["config"])
        base = Options(model=config.model, threads=config.threads)
        for number, round_ in enumerate(report["rounds"]):
            machine = read_machine(round_["profile"])
            runs: dict[int, dict[str, Any]] = {}
            for users, setting in settings_of(config, machine.chunk_bytes(1), config.seed + number).items():
                runs[users] = {
                    system: put_together(
                        setting, system, machine, base, run["real"], run["drift"], run["calibrations"]
                    )
                    for system, run in round_["runs"][str(users)].items()
                }
            rounds.append(round_ | {"runs": runs, "command": report["command"], "commit": report["commit"]})
    return rounds


def report_of(arguments: argparse.Namespace, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the rounds, and what they say."""
    results: dict[int, dict[str, Any]] = {}
    for users in dict.fromkeys(users for one in rounds for users in one["runs"]):
        results[users] = {}
        there = [one["runs"][users] for one in rounds if users in one["runs"]]
        for system in there[0]:
            each = [systems[system] for systems in there]
            results[users][system] = {
                "rounds": len(each),
                "real_mean": mean_of([one["real"] for one in each]),
                "simulated": mean_of([one["simulated"] for one in each]),
                "compared": mean_of([one["compared"] for one in each]),
                "compared_at_drift": mean_of([one["compared_at_drift"] for one in each]),
            }
    return {
        "benchmark": "validate_simulator", "commit": commit(), "command": " ".join(["python", "benchmarks/validate_simulator.py", *sys.argv[1:]]),
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "verdict": judge(results, "compared"), "verdict_at_drift": judge(results, "compared_at_drift"),
        "results": results, "rounds": rounds,
    }  # fmt: skip


def run_round(
    number: int,
    arguments: argparse.Namespace,
    base: Options,
    loaded: LoadedModel,
    clock: Clock,
    base_clock: Callable[[], float],
    calibrate: Calibration,
    systems: Sequence[str],
) -> dict[str, Any]:
    """A profile, and one run of everything."""
    say(f"round {number}: load average {load_average()}, measuring the profile")
    load_profile = load_average()
    profile = load_or_measure(
        loaded.model,
        2048,
        CHUNK,
        fresh=True,
        clock=base_clock,
        progress=lambda what, share: calibrate.sample(),
    )
    then = calibrate.take()
    content: dict[str, Any] = {
        **document(profile, loaded.model),
        "model": loaded.resolved.label,
        "weights": loaded.resolved.weights,
    }
    machine = read_machine(json.loads(json.dumps(content)))
    settings = settings_of(arguments, machine.chunk_bytes(1), arguments.seed + number)
    found: dict[int, dict[str, Any]] = {}
    for users, setting in settings.items():
        found[users] = {}
        for system in systems:
            real, now = run_real(setting, system, base, loaded, clock, machine, calibrate)
            one = found[users][system] = put_together(
                setting, system, machine, base, real, drift_of(then, now), now
            )
            simulated, compared, factor = (
                one["simulated"],
                one["compared"],
                statistics.fmean(one["drift"].values()),
            )
            say(
                f"round {number}, {users} users, {system}: real {real['requests_per_s']:.3f} requests/s in {real['wall_s']:.0f} s, simulated "
                f"{simulated['requests_per_s']:.3f} ({compared['requests_per_s'] - 1:+.1%}; at drift {factor:.2f} "
                f"{one['compared_at_drift']['requests_per_s'] - 1:+.1%}); sources {[round(100 * v, 1) for v in real['tokens_by_source'].values()]} "
                f"{[round(100 * v, 1) for v in simulated['tokens_by_source'].values()]}; steps taken over predicted "
                f"{real['worker_s'] / real['worker_predicted_s']:.3f} {real['taken_over_predicted']}, beside them {real['beside_worker_ms_a_step']:.2f} ms"
            )
    return {
        "load_average_at_profile": load_profile, "calibrations_at_profile": then, "profile": content,
        "tiers": {users: asdict(setting) | {"load": None} for users, setting in settings.items()}, "runs": found,
    }  # fmt: skip


if __name__ == "__main__":
    main()
