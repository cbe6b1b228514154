"""The measurements of a model on a machine, as plain numbers and as JSON.

Knows numbers; never tensors, clocks or files. Kept apart from `runtime.profiling`, which measures, so that
reading a profile, as the simulator does, needs no model library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 2  # of the JSON, and of what is measured: raised when the meaning of either changes


@dataclass(frozen=True, slots=True)
class Profile:
    """Plain numbers, each a median after warm-up.

    A step costs `step_points` at its tokens, `answer_points` at the answers that get a token in it, and
    attention span by span, see `attention_costs`. Planning comes on top.
    """

    chunk_tokens: int
    points: tuple[
        tuple[int, float], ...
    ]  # (context tokens, seconds to compute the chunk at their end), ascending
    rest_s: (
        float  # the part of these seconds that does not depend on the context: their line at a context of 0
    )
    prefill_tokens_per_s: float  # of one prompt of up to 512 tokens
    decode_step_s: float  # one token of one request at a context of up to 1,024 tokens
    copy_bytes_per_s: dict[str, float]  # by direction, "gpu->cpu" and "cpu->gpu", a few chunks at a time
    step_points: tuple[
        tuple[int, float], ...
    ]  # (tokens of a step, its seconds without attention if no answer gets a token), ascending
    answer_points: tuple[
        tuple[int, float], ...
    ]  # (answers that get a token in a step, seconds that they add: output layer, sampling), ascending
    decode_token_s: float  # attention of one query, seconds for each token that it sees
    chunk_token_s: float  # attention of all of a chunk's queries, seconds for each token before the chunk
    plan_step_s: float  # seconds to plan a step
    plan_request_s: float  # seconds more for each request in it
    commit_step_s: float  # seconds to take a step's result in, up to the next plan
    commit_request_s: float  # seconds more for each request in it
    commit_end_s: float  # seconds more for each answer that ends


def attention_costs(decode_token_s: float, chunk_token_s: float, chunk_tokens: int) -> tuple[float, float]:
    """A span's attention: seconds for each token that it sees, and for each pair of a query and a token seen.

    K and V of a token are read once; each pair is computed. One query over n tokens takes n (read + pair), a
    chunk of C queries n (read + C pair): two measurements give the two numbers.
    """
    if chunk_tokens < 2:
        return 0.0, decode_token_s
    pair_s = min(decode_token_s, max(0.0, chunk_token_s - decode_token_s) / (chunk_tokens - 1))
    return decode_token_s - pair_s, pair_s


def attention_s(read_s: float, pair_s: float, queries: int, context: int) -> float:
    """Seconds of all layers' attention for one span of `queries` tokens whose last one sees `context` tokens.

    See `attention_costs`.
    """
    return context * read_s + queries * (context - (queries - 1) / 2) * pair_s


def parse(content: Mapping[str, Any]) -> Profile:
    """A profile from its JSON, the inverse of `dataclasses.asdict`.

    Raises:
        ValueError: it has another format, a field is missing, or a number makes no sense; the message says
            which.
    """
    if content.get("format") != FORMAT:
        raise ValueError(
            f"its format is {content.get('format')!r}, this version reads {FORMAT}: measure again (`pensieve "
            "profile --fresh`)"
        )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Profile):
        if field.name not in content:
            raise ValueError(f"{field.name} is missing")
        try:
            values[field.name] = _READERS[field.name](content[field.name])
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{field.name} cannot be read ({type(error).__name__}: {error})") from error
    profile = Profile(**values)
    _check(profile)
    return profile


def _points(value: Any) -> tuple[tuple[int, float], ...]:
    return tuple((int(place), float(seconds)) for place, seconds in value)


def _rates(value: Any) -> dict[str, float]:
    return {str(name): float(rate) for name, rate in value.items()}


_READERS: dict[str, Any] = {
    "chunk_tokens": int,
    "points": _points,
    "rest_s": float,
    "prefill_tokens_per_s": float,
    "decode_step_s": float,
    "copy_bytes_per_s": _rates,
    "step_points": _points,
    "answer_points": _points,
    "decode_token_s": float,
    "chunk_token_s": float,
    "plan_step_s": float,
    "plan_request_s": float,
    "commit_step_s": float,
    "commit_request_s": float,
    "commit_end_s": float,
}


def _check(profile: Profile) -> None:
    for name, least, zero in (("points", 1, False), ("step_points", 2, False), ("answer_points", 1, True)):
        found = getattr(profile, name)
        places = [place for place, _ in found]
        if len(found) < least or places != sorted(set(places)) or places[0] < 1:
            raise ValueError(
                f"{name} must be at least {least} pairs (tokens, seconds), ascending, got {list(found)}"
            )
        _check_numbers(name, [seconds for _, seconds in found], zero=zero)
    _check_numbers("chunk_tokens", [profile.chunk_tokens], zero=False)
    _check_numbers("prefill_tokens_per_s", [profile.prefill_tokens_per_s], zero=False)
    _check_numbers("decode_step_s", [profile.decode_step_s], zero=False)
    _check_numbers("copy_bytes_per_s", list(profile.copy_bytes_per_s.values()), zero=False)
    for name in (
        "decode_token_s",
        "chunk_token_s",
        "plan_step_s",
        "plan_request_s",
        "commit_step_s",
        "commit_request_s",
        "commit_end_s",
    ):
        _check_numbers(name, [getattr(profile, name)], zero=True)
    if not 0.0 <= profile.rest_s <= min(seconds for _, seconds in profile.points):
        raise ValueError(f"rest_s of {profile.rest_s} s is no part of its points")


def _check_numbers(name: str, numbers: list[float], *, zero: bool) -> None:
    for number in numbers:
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise ValueError(f"{name} must be {'at least 0' if zero else 'positive'}, got {number}")
