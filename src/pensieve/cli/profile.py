"""`pensieve profile`: measure Cost(l) of a model on this machine, and keep it for eviction (and for the
simulator).
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import click

from pensieve.cli.options import model_options, pick
from pensieve.errors import ConfigError
from pensieve.runtime.loading import load_model
from pensieve.worker.rank import Rank


@click.command()
@click.option(
    "--max-context",
    type=click.IntRange(min=32),
    default=None,
    help="Longest context measured (default: the model's, at most 8192).",
)
@click.option("--fresh", is_flag=True, help="Measure again even if a profile is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@model_options
def profile(max_context: int | None, fresh: bool, as_json: bool, **shared: Any) -> None:
    """Measure what recomputing a chunk costs at each context length (Cost(l), paper §4.3.1), and keep it."""
    from pensieve.runtime.profiling import document, load_or_measure

    if Rank.from_environment() is not None:
        raise ConfigError("`pensieve profile` measures one process: start it without torchrun")
    options = pick(shared)
    loaded = load_model(
        options, must_talk=False, say=lambda message: click.secho(message, dim=True, err=True)
    )
    note = f": {loaded.resolved.note}" if loaded.resolved.note else ""
    click.secho(
        f"{loaded.resolved.label}, {loaded.resolved.weights} weights, {loaded.dtype} on "
        f"{options.device}{note}",
        fg="cyan",
        err=as_json,
    )
    longest = max_context or min(loaded.shape.max_positions, 8192)
    measured = load_or_measure(
        loaded.model,
        longest,
        options.chunk_tokens,
        fresh=fresh,
        progress=lambda what, share: click.secho(f"{share:4.0%} {what}", dim=True, err=True),
    )
    if as_json:
        click.echo(
            json.dumps(
                {
                    **document(measured, loaded.model),
                    "model": loaded.resolved.label,
                    "weights": loaded.resolved.weights,
                }
            )
        )
        return
    click.echo(f"\n{'context':>8}  {'ms a chunk':>10}  {'of it attention':>15}")
    for context, seconds in measured.points:
        click.echo(f"{context:>8}  {1e3 * seconds:>10.2f}  {max(0.0, 1 - measured.rest_s / seconds):>15.0%}")
    click.echo(f"\n{'tokens':>8}  {'ms a step':>10}    {'answers':>8}  {'ms more':>8}")
    for (tokens, step_s), answer in itertools.zip_longest(measured.step_points, measured.answer_points):
        more = "" if answer is None else f"    {answer[0]:>8}  {1e3 * answer[1]:>8.2f}"
        click.echo(f"{tokens:>8}  {1e3 * step_s:>10.2f}{more}")
    click.echo(
        f"\nattention {1e6 * measured.decode_token_s:.2f} us a token that one query sees, "
        f"{1e6 * measured.chunk_token_s:.2f} us a token before a chunk"
    )
    click.echo(
        f"planning {1e3 * measured.plan_step_s:.2f} ms a step and {1e6 * measured.plan_request_s:.0f} us a "
        f"request in it, committing {1e3 * measured.commit_step_s:.2f} ms, "
        f"{1e6 * measured.commit_request_s:.0f} us, and {1e6 * measured.commit_end_s:.0f} us an answer's end"
    )
    click.echo(
        f"prefill {measured.prefill_tokens_per_s:,.0f} tokens/s, decode step "
        f"{1e3 * measured.decode_step_s:.1f} ms"
    )
    for direction, speed in measured.copy_bytes_per_s.items():
        click.echo(f"copy {direction} {speed / 1e9:.1f} GB/s")
