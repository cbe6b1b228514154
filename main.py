"""The experiment entry point: Pensieve, its stateless baseline, or both side by side. Thin: the CLI's functions do the work.

python main.py --mode compare --model gpt2 --num-concurrent-users 6 --request-interval 0.5
python main.py --mode pensieve --interactive
python main.py --mode demo
"""

from __future__ import annotations

from typing import Any

import click

from pensieve.cli import run_command
from pensieve.cli.chat import run_chat
from pensieve.cli.compare import Workload, run_compare, run_one
from pensieve.core.request import SamplingParams
from pensieve.runtime.options import Options


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--mode",
    type=click.Choice(["pensieve", "vllm", "compare", "demo"]),
    default="demo",
    show_default=True,
    help="pensieve: stateful; vllm: the stateless baseline (Pensieve's engine, nothing kept between turns); compare: both, side by side; "
    "demo: a short compare under memory pressure.",
)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    help="smollm2, a hub id, a folder, a .gguf file or a named architecture.",
)
@click.option("--weights", type=click.Choice(["auto", "random"]), default="auto", show_default=True)
@click.option(
    "--gpu-cache",
    "gpu_cache_gb",
    type=float,
    default=None,
    help="First tier, GB.  [default: half of the free memory, demo: 0.09]",
)
@click.option(
    "--cpu-cache",
    "cpu_cache_gb",
    type=float,
    default=None,
    help="Second tier, GB.  [default: none on a CPU, 2 beside a GPU, demo: 0.02]",
)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where this CPU multiplies it fast, else float32.",
)
@click.option(
    "--interactive",
    is_flag=True,
    help="Chat in the terminal instead of running a workload (modes pensieve and vllm).",
)
@click.option(
    "--dataset",
    default=None,
    help="ShareGPT-style JSON or JSONL of conversations (default: the shipped ones).",
)
@click.option(
    "--num-conversations",
    type=click.IntRange(min=1),
    default=None,
    help="How many are used (default: one a user).",
)
@click.option("--min-turns", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--max-turns", type=click.IntRange(min=1), default=6, show_default=True)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=None, help="[default: 32, interactive: 256]"
)
@click.option("--num-concurrent-users", type=click.IntRange(min=1), default=6, show_default=True)
@click.option(
    "--request-interval",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds between an answer and its user's next turn (hot 0.3x, warm 1x, cold 2.5x).",
)
@click.option("--max-context", type=int, default=None)
@click.option("--overflow", type=click.Choice(["refuse", "truncate"]), default="refuse", show_default=True)
@click.option(
    "--baseline-url",
    default=None,
    help="A real vLLM or other OpenAI-compatible server as the baseline instead (mode compare).",
)
@click.option("--out", "out_dir", default=None, help="Folder for the plot and the JSON (default: out/).")
def experiment(
    mode: str,
    interactive: bool,
    max_new_tokens: int | None,
    gpu_cache_gb: float | None,
    cpu_cache_gb: float | None,
    baseline_url: str | None,
    out_dir: str | None,
    **arguments: Any,
) -> None:
    """Run Pensieve, the stateless baseline, or both on the same conversations."""
    workload = Workload(
        dataset=arguments.pop("dataset"),
        num_users=arguments.pop("num_concurrent_users"),
        num_conversations=arguments.pop("num_conversations"),
        min_turns=arguments.pop("min_turns"),
        max_turns=arguments.pop("max_turns"),
        max_new_tokens=max_new_tokens or 32,
        request_interval_s=arguments.pop("request_interval"),
    )
    small = mode == "demo"
    arguments["gpu_cache_gb"] = gpu_cache_gb if gpu_cache_gb is not None else 0.09 if small else None
    arguments["cpu_cache_gb"] = cpu_cache_gb if cpu_cache_gb is not None else 0.02 if small else None
    if interactive:
        if mode not in ("pensieve", "vllm"):
            raise click.UsageError(
                f"--interactive chats with one system: use --mode pensieve or --mode vllm, not {mode}"
            )
        sampling = SamplingParams(max_new_tokens=max_new_tokens or 256)
        run_chat(arguments, None, None, None, sampling, retain=mode == "pensieve")
    elif mode in ("compare", "demo"):
        run_compare(Options(**arguments), workload, baseline_url=baseline_url, out_dir=out_dir)
    else:
        run_one(Options(**arguments), workload, retain=mode == "pensieve", out_dir=out_dir)


if __name__ == "__main__":
    run_command(experiment, "main.py")
