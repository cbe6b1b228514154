"""`python benchmarks/gpu`: the scripts in the order of what they teach, and their commands; `--run` runs them.

    python benchmarks/gpu [--device cuda]               list
    python benchmarks/gpu --run --out DIR               run each, ten minutes at most, its JSON in DIR
    python benchmarks/gpu --run --out DIR --only kernel,decode

Each is complete in itself: one that breaks or takes too long takes no other along. The last line is JSON, of what each came to.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True, slots=True)
class Job:
    """One command."""

    name: str  # of its result, too
    script: str
    arguments: tuple[str, ...]  # {out}: the folder of results
    teaches: str

    def command(self, out: str, extra: list[str]) -> list[str]:
        """What is to be run, without the interpreter."""
        told = [argument.replace("{out}", out) for argument in self.arguments]
        return [
            f"{HERE.parent.name}/{HERE.name}/{self.script}.py",
            *told,
            *extra,
            "--out",
            f"{out}/{self.name}.json",
        ]


JOBS = (
    Job(
        "kernel",
        "kernel",
        (),
        "attention over scattered KV against contiguous KV, memory and the matrix units",
    ),
    Job(
        "decode",
        "decode",
        (),
        "a decode step against what memory allows; the host's work and the device's idle share",
    ),
    Job(
        "transfers",
        "transfers",
        (),
        "copies against a memcpy; steps beside swap-outs; a swapped-in turn against a resident one",
    ),
    Job("serving", "serving", (), "the paper's figure 10b: stateless and stateful"),
    Job(
        "serving-gpu-only",
        "serving",
        ("--modes", "gpu-only", "--with", "{out}/serving.json"),
        "the same with the gpu tier alone",
    ),
    Job(
        "serving-vllm",
        "serving",
        ("--modes", "vllm", "--with", "{out}/serving.json"),
        "the same, vLLM with prefix caching",
    ),
    Job(
        "serving-vllm-offload",
        "serving",
        ("--modes", "vllm-offload", "--with", "{out}/serving-vllm.json"),
        "and with its CPU offload",
    ),
)
LONGEST_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--out", default="out/gpu", help="folder of the results")
    parser.add_argument("--only", default=None, help="names, several with commas")
    parser.add_argument("--device", default=None)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    extra = (["--device", options.device] if options.device else []) + (["--quick"] if options.quick else [])
    only = None if options.only is None else options.only.split(",")
    if strange := set(only or ()) - {job.name for job in JOBS}:
        parser.error(f"no such script: {', '.join(sorted(strange))}")
    told = {}
    for job in JOBS:
        if only is not None and job.name not in only:
            continue
        command = job.command(str(Path(options.out).resolve()) if options.run else options.out, extra)
        print(f"# {job.teaches}\nPYTHONPATH=src python {shlex.join(command)}", file=sys.stderr, flush=True)
        told[job.name] = {
            "command": shlex.join(["python", *command]),
            "status": run(command) if options.run else None,
        }
    print(json.dumps({"benchmark": "gpu", "ran": options.run, "scripts": told}))
    return 1 if any(job["status"] for job in told.values()) else 0


def run(command: list[str]) -> int | str:
    """The exit status, or that it took too long."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    }
    try:
        return subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=LONGEST_S,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {LONGEST_S:g} s; its result holds what it had"


if __name__ == "__main__":
    sys.exit(main())
