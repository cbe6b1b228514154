"""Many cases on all cores. Knows processes; nothing of what a case is about. The order and the number of
processes change no result.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from pensieve.errors import ConfigError
from pensieve.simulator.case import Case, Outcome, run_case

_POLL_S = 0.2

Tell = Callable[["Tick"], None]


@dataclass(frozen=True, slots=True)
class Tick:
    """How far one case is."""

    index: int  # of the case
    now_s: float  # simulated
    finished: int  # requests
    done: bool = False


def run_cases(
    cases: Sequence[Case], *, jobs: int | None = None, tell: Tell | None = None, keep_records: bool = False
) -> list[Outcome]:
    """Simulate every case, as many at a time as there are cores.

    Args:
        cases: in any order; the outcomes come in it.
        jobs: processes; None: one a core. 1: none but this one.
        tell: called in this process with how far cases are.
        keep_records: outcomes have every request.

    Raises:
        ConfigError: a case is wrong; the others are given up.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    tell = tell or (lambda tick: None)
    jobs = min(jobs or os.cpu_count() or 1, len(cases))
    if jobs <= 1:
        return [_here(index, case, tell, keep_records) for index, case in enumerate(cases)]
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
    ticks: Any = context.Queue()
    with ProcessPoolExecutor(jobs, context, _prepare, (ticks,)) as pool:
        # the longest first, so that no core is left with one at the end
        order = sorted(range(len(cases)), key=lambda index: -_weight(cases[index]))
        futures: dict[int, Future[Outcome]] = {
            index: pool.submit(_there, index, cases[index], keep_records) for index in order
        }
        try:
            while not all(future.done() for future in futures.values()):
                failed = next(
                    (
                        f
                        for f in futures.values()
                        if f.done() and not f.cancelled() and f.exception() is not None
                    ),
                    None,
                )
                if failed is not None:
                    failed.result()
                try:
                    tell(ticks.get(timeout=_POLL_S))
                except queue.Empty:
                    continue
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        return [futures[index].result() for index in range(len(cases))]


def _weight(case: Case) -> float:
    rates = case.load.rates
    return (rates[case.run] if rates else 1.0) * (case.load.duration_s or 1.0)


def _here(index: int, case: Case, tell: Tell, keep_records: bool) -> Outcome:
    outcome = run_case(
        case, tell=lambda now_s, finished: tell(Tick(index, now_s, finished)), keep_records=keep_records
    )
    tell(Tick(index, outcome.simulated_s, outcome.summary.sent, done=True))
    return outcome


_ticks: Any = None  # of this process, if it is one of a sweep's


def _prepare(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _there(index: int, case: Case, keep_records: bool) -> Outcome:
    parent = os.getppid()

    def tell(tick: Tick) -> None:
        if os.getppid() != parent:  # the process that asked for it was killed
            os._exit(1)
        _ticks.put(tick)

    return _here(index, case, tell, keep_records)
