"""The paper's figure 10b: how much is answered at twice the latency of an idle system, stateless, stateful, and beside vLLM.

    python benchmarks/gpu/serving.py [--modes stateless,pensieve] [--out FILE]
    python benchmarks/gpu/serving.py --modes gpu-only --with FILE
    python benchmarks/gpu/serving.py --modes vllm,vllm-offload --with FILE [--vllm PYTHON]
    python benchmarks/gpu/serving.py --device cpu --quick --modes stateless,pensieve,gpu-only

Llama 2-13B-GQA with random weights; conversations as long as ShareGPT's, Poisson arrivals, exponential think times. Think time and the room for
idle histories are scaled down together from the paper's (60 s; 40 GB, which also holds the running requests, and 220 GB), so that a point takes a minute and a
quarter; each mode gets three rates, each chosen by what the last came to, around the limit: twice the normalized latency of the first mode when idle.

stateless     our engine, nothing kept between turns, the same gpu tier
pensieve      gpu and cpu tiers
gpu-only      the gpu tier alone, what leaves it is dropped
vllm          prefix caching on, as many bytes of KV on the GPU; in a process of its own
vllm-offload  the same, with as many bytes offloaded to the CPU as our cpu tier has

Logits are compared with the reference attention's first; every answer must have the length that was asked for, and after a mode every slot must be
free. `--with` takes limit and crossings from an earlier run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if (
    not __package__
):  # Python puts this very folder on its path, whose modules are meant to be found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from peers.curve import Crossing

from gpu.arrivals import Answer, Lengths, Load, ratio_of, sweep
from gpu.common import ROOT, Report, parser
from gpu.models import Loaded, World, check, config_of, greedy, load
from pensieve.engine.messages import Abort, Check, Checked, Event, Failed, Finished, Forget, Forgotten, Submit

MODEL = "llama2-13b-gqa"
OURS = ("stateless", "pensieve", "gpu-only")
VLLM = ("vllm", "vllm-offload")
STATELESS_GOAL, VLLM_GOAL = 1.5, 1.3
NAMESPACE = "bench"
DRIVER = Path(__file__).resolve().parent / "vllm_driver.py"


class OurServer:
    """Our engine on a thread of its own, its answers brought to an event loop."""

    def __init__(
        self,
        loaded: Loaded,
        gpu_slots: int,
        cpu_slots: int,
        attention: str,
        *,
        retain: bool,
        max_context: int,
    ) -> None:
        self.world = World(
            loaded,
            gpu_slots,
            cpu_slots,
            attention=attention,
            emit=self._emit,
            retain=retain,
            max_context=max_context,
        )
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[Event]] = {}  # by request id or tag; touched on the loop only
        self._conversations: set[str] = set()
        self._count = 0
        self.world.engine.start()

    async def ask(self, conversation: str, prompt: tuple[int, ...], history: int, new: int) -> Answer:
        """See `arrivals.Server`.

        Raises:
            RuntimeError: the request failed.
        """
        self._count += 1
        self._conversations.add(conversation)
        name = f"r{self._count}"
        ended = await self._answer(name, Submit(name, conversation, NAMESPACE, prompt, history, greedy(new)))
        if not isinstance(ended, Finished):
            raise RuntimeError(f"{ended}")
        receipt = ended.receipt
        cached = receipt.gpu_tokens + receipt.cpu_tokens
        return Answer(
            ended.output, receipt.first_token_s, cached, receipt.cpu_tokens, receipt.recomputed_tokens
        )

    async def clear(self) -> None:
        """See `arrivals.Server`.

        Raises:
            RuntimeError: an invariant of the cache does not hold, or slots are still used.
        """
        for name in [name for name in self._waiting if name.startswith("r")]:
            self.world.engine.post(Abort(name))
        for conversation in self._conversations:
            await self._answer(f"t{conversation}", Forget(conversation, NAMESPACE, tag=f"t{conversation}"))
        self._conversations.clear()
        used: tuple[int, ...] = ()
        for _ in range(200):  # copies under way give their slots back when they settle
            checked = await self._answer("tcheck", Check("tcheck"))
            assert isinstance(checked, Checked)
            if checked.error is not None:
                raise RuntimeError(f"the cache is not right: {checked.error}")
            used = checked.used
            if not any(used):
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"slots are still used after all was forgotten: {used}")

    async def _answer(self, name: str, command: Any) -> Event:
        future: asyncio.Future[Event] = self._loop.create_future()
        self._waiting[name] = future
        self.world.engine.post(command)
        try:
            return await future
        finally:
            if future.done() and not future.cancelled():
                self._waiting.pop(name, None)

    def _emit(self, events: list[Event]) -> None:
        """On the engine's thread: endings only, tokens are nobody's business here."""
        for event in events:
            if isinstance(event, Finished | Failed):
                self._loop.call_soon_threadsafe(self._settle, event.request_id, event)
            elif isinstance(event, Forgotten | Checked):
                self._loop.call_soon_threadsafe(self._settle, event.tag, event)

    def _settle(self, name: str, event: Event) -> None:
        future = self._waiting.get(name)
        if future is not None and not future.done():
            future.set_result(event)
        elif future is not None:
            self._waiting.pop(name, None)  # nobody waits for it any more


class Bench:
    """All modes of one run."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options = report, options
        self.load = load_of(options)
        self.found: dict[str, dict[str, Any]] = {}
        self.limit_ms: float | None = options.limit_ms
        if options.with_file is not None:
            earlier = json.loads(options.with_file.read_text())
            cases = earlier.get("with", {}).get("cases", {}) | earlier["cases"]
            self.found = {name: case for name, case in cases.items() if "crossing" in case}
            self.limit_ms = self.limit_ms or earlier.get("limit_ms")
            report.note(
                "with",
                {
                    "file": str(options.with_file),
                    "command": earlier["command"],
                    "date": earlier["date"],
                    "cases": dict(self.found),
                },
            )
        if self.limit_ms is not None:
            report.note("limit_ms", self.limit_ms)
        report.note("load", self.load.as_json())

    def run(self, modes: list[str]) -> None:
        ours = [mode for mode in modes if mode in OURS]
        if ours:
            with self.report.attempt("the model"):
                self._run_ours(ours)  # a method of its own: the model's memory is for others afterwards
        gc.collect()
        for mode in modes:
            if mode in VLLM:
                with self.report.attempt(mode):
                    self._vllm(mode)
        self._goals()

    def _run_ours(self, modes: list[str]) -> None:
        loaded = load(self.report, MODEL)
        with torch.inference_mode():
            check(self.report, loaded)
        for mode in modes:
            with self.report.attempt(mode):
                self._take(mode, asyncio.run(self._ours(mode, loaded)))

    def _first_rate(self) -> float:
        """Where to look for a mode's crossing first: a little over the last one's."""
        if self.options.first_rate is not None:
            return float(self.options.first_rate)
        crossings = [
            case["crossing"]["requests_per_s"]
            for case in self.found.values()
            if case["crossing"]["requests_per_s"]
        ]
        return 1.3 * crossings[-1] if crossings else 6.0

    def _take(self, mode: str, told: dict[str, Any]) -> None:
        if told["num_errors"]:
            self.report.wrong(f"{mode}: {told['num_errors']} errors, the first: {told['errors'][0]}")
        if told["points_left_out"]:
            self.report.skip(f"{mode}: {told['points_left_out']} rates", "there was no time left")
        self.limit_ms = self.limit_ms or told["limit_ms"]
        self.report.note("limit_ms", self.limit_ms)
        line = f"unloaded {told['unloaded_ms']:.2f} ms a token"
        if "crossing" in told:
            self.found[mode] = told
            crossing = told["crossing"]
            line += f"; {crossing['bound'] or ''} {crossing['requests_per_s']:.2f} requests/s at {self.limit_ms:.2f}"
        self.report.case(mode, told, line)

    async def _ours(self, mode: str, loaded: Loaded) -> dict[str, Any]:
        options = self.options
        gpu_slots = int(options.gpu_gb * 1e9 / loaded.chunk_bytes)
        cpu_slots = int(options.cpu_gb * 1e9 / loaded.chunk_bytes) if mode == "pensieve" else 0
        begin = time.perf_counter()
        server = OurServer(
            loaded, gpu_slots, cpu_slots, options.attention, retain=mode != "stateless", max_context=self.load.max_context
        )  # fmt: skip
        self.report.note("attention", server.world.worker.attention)
        self.report.say(f"{mode}: {gpu_slots} + {cpu_slots} chunks in {time.perf_counter() - begin:.0f} s")
        try:
            told = await sweep(
                server, self.load, limit_ms=self.limit_ms, first_rate=self._first_rate(),
                say=lambda text: self.report.say(f"{mode} {text}"), left_s=lambda: self.report.left_s,
            )  # fmt: skip
        finally:
            server.world.close()
        scheduler = server.world.scheduler
        told |= {
            "slots": {"gpu": gpu_slots, "cpu": cpu_slots}, "suspensions": scheduler.num_suspensions,
            "copies_failed": scheduler.num_copies_failed, "forwards_failed": scheduler.num_forwards_failed,
        }  # fmt: skip
        if scheduler.num_forwards_failed or scheduler.num_copies_failed:
            self.report.wrong(
                f"{mode}: {scheduler.num_forwards_failed} forwards and {scheduler.num_copies_failed} copies failed"
            )
        if mode != "stateless" and not any(point["cached_tokens"] for point in told["points"]):
            self.report.wrong(f"{mode}: nothing was ever found in the cache")
        return told

    def _vllm(self, mode: str) -> None:
        """In a process of its own: another environment, another owner of the device."""
        python = self.options.vllm or (sys.executable if importlib.util.find_spec("vllm") else None)
        if python is None:
            self.report.skip(mode, "vLLM cannot be imported here, and --vllm names no Python that can")
            return
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(MODEL, quick=self.options.quick)
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(folder)
            asked = {
                "folder": folder, "load": self.load.as_json(), "limit_ms": self.limit_ms, "first_rate": self._first_rate(),
                "gpu_bytes": int(self.options.gpu_gb * 1e9), "cpu_gib": self.options.cpu_gb * 1e9 / 2**30 if mode == "vllm-offload" else None,
                "dtype": self.options.dtype, "left_s": self.report.left_s,
            }  # fmt: skip
            path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
            process = subprocess.Popen(
                [python, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )  # fmt: skip
            overdue = threading.Timer(self.report.left_s + 20, end_all, (process,))
            overdue.start()
            try:
                out, _ = process.communicate(json.dumps(asked))
            finally:
                overdue.cancel()
                end_all(process)  # vLLM's engine is a process of its own, and holds the device's memory
        if process.returncode:
            raise RuntimeError(f"the driver of vLLM ended with status {process.returncode}")
        self._take(mode, json.loads(out.strip().splitlines()[-1]))

    def _goals(self) -> None:
        def crossing(mode: str) -> Crossing:
            return Crossing(**self.found[mode]["crossing"])

        if "pensieve" not in self.found:
            return
        others: list[str] = [mode for mode in ("stateless", "gpu-only") if mode in self.found]
        rivals = [mode for mode in VLLM if mode in self.found]
        if rivals:
            others.append(max(rivals, key=lambda mode: crossing(mode).requests_per_s))
        ratios = {}
        for mode in others:
            ratio, bound = ratio_of(crossing("pensieve"), crossing(mode))
            ratios[mode] = {"ratio": ratio, "bound": bound or None}
            what = f"pensieve: requests/s at {self.limit_ms:.2f} ms a token, of {mode}'s"
            if mode != "gpu-only":
                self.report.goal(
                    what,
                    ratio,
                    STATELESS_GOAL if mode == "stateless" else VLLM_GOAL,
                    at_least=True,
                    known=bound,
                )
            self.report.say(f"{what}: {bound} {ratio:.2f}")
        self.report.note("ratios", ratios)


def end_all(process: subprocess.Popen[str]) -> None:
    """End a process and those it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def load_of(options: argparse.Namespace) -> Load:
    """The load that the options ask for."""
    if options.quick:
        lengths = Lengths(mean_turns=2.5, mean_input=12, mean_output=6, most_turns=4, most_tokens=24)
        return Load(lengths, 0.1, options.point_s or 1.2, 0.8, 1.0, 3, 512, 512, options.seed, num_points=2)
    vocab = config_of(MODEL, quick=False).vocab_size
    point_s = options.point_s or 75.0
    return Load(Lengths(), options.think_s, point_s, point_s * 0.5, 15.0, 8, 8192, vocab, options.seed)


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on --quick filled in."""
    arguments = parser(__doc__)
    arguments.add_argument("--modes", default="stateless,pensieve", help=f"some of {', '.join(OURS + VLLM)}")
    arguments.add_argument("--gpu-gb", type=float, default=None, help="KV on the GPU, every mode (20)")
    arguments.add_argument(
        "--cpu-gb", type=float, default=None, help="KV in main memory, pensieve and vllm-offload (24)"
    )
    arguments.add_argument("--think-s", type=float, default=5.0, help="mean think time")
    arguments.add_argument(
        "--point-s",
        type=float,
        default=None,
        help="arrivals at one rate (75); the second half of them counts",
    )
    arguments.add_argument(
        "--first-rate", type=float, default=None, help="turns a second to begin with, every mode"
    )
    arguments.add_argument(
        "--limit-ms",
        type=float,
        default=None,
        help="normalized latency at which throughput is told; twice the first mode's when idle",
    )
    arguments.add_argument(
        "--with",
        dest="with_file",
        type=Path,
        default=None,
        help="an earlier run's JSON, whose limit and modes are used",
    )
    arguments.add_argument("--vllm", default=None, help="a Python that has vLLM")
    options = arguments.parse_args(words)
    if strange := set(options.modes.split(",")) - {*OURS, *VLLM}:
        arguments.error(f"no such mode: {', '.join(sorted(strange))}")
    if options.with_file is not None and not options.with_file.is_file():
        arguments.error(f"--with {options.with_file}: there is no such file")
    options.gpu_gb = options.gpu_gb or (0.0008 if options.quick else 20.0)
    options.cpu_gb = options.cpu_gb or (0.002 if options.quick else 24.0)
    if options.quick and options.first_rate is None:
        options.first_rate = 8.0
    return options


def main() -> int:
    options = options_of()
    report = Report("serving", options)
    Bench(report, options).run(options.modes.split(","))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
