"""A turn's receipt: where its tokens came from and what it cost.

Knows counts, ranges and causes; never chunks, slots or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Why = Literal[
    "new",  # never computed
    "never_seen",  # said to be history, but the cache has no trace of it, as after a restart
    "on_cpu",  # in a lower tier, swapped in
    "dropped",  # evicted from every tier
    "failed",  # lost to a copy or a forward pass that failed
    "unfinished",  # a turn's last token, or the rest of a partial chunk: it had no KV yet
    "other_namespace",  # cached in another namespace of the same tenant, hence not shared
    "template_changed",  # the chat template rendered earlier turns differently (the service finds this)
]


@dataclass(frozen=True, slots=True)
class Miss:
    """A token range of a prompt that was not in the first tier at its first admission, and why."""

    start: int
    stop: int
    why: Why
    at_s: float | None = None  # engine clock: when (the last of) it was lost; None if it was not lost
    by: str | None = None  # the sequence that took its slot; None if unknown


@dataclass(slots=True)
class Receipt:
    """Filled in by the scheduler while the request lives; the same value goes to every reader after that.

    Once the request was admitted: gpu_tokens + cpu_tokens + recomputed_tokens + new_tokens = prompt_tokens.
    """

    prompt_tokens: int
    gpu_tokens: int = 0  # found in the first tier
    cpu_tokens: int = 0  # swapped in from a lower tier
    recomputed_tokens: int = 0  # of the history, computed again from raw tokens
    new_tokens: int = 0  # never computed before for this conversation
    output_tokens: int = 0
    bytes_in: int = 0  # swapped in for this request, also after suspensions
    bytes_out: int = 0  # of this conversation, swapped out since its previous receipt
    suspensions: int = 0
    resume_cpu_tokens: int = 0  # swapped in again after suspensions
    resume_recomputed_tokens: int = 0  # computed again after suspensions and failures
    queue_s: float = 0.0  # from submission to first admission, or to the end if it was never admitted
    first_token_s: float | None = None  # from submission to the first token; None if there was none
    total_s: float = 0.0  # from submission to the end
    truncated_tokens: int = 0  # of the history, left out by --overflow truncate
    misses: tuple[Miss, ...] = ()  # ascending; they cover exactly what was not found in the first tier

    def __str__(self) -> str:
        first = "-" if self.first_token_s is None else f"{1e3 * self.first_token_s:.0f} ms"
        parts = [
            f"prompt {self.prompt_tokens} tokens = gpu {self.gpu_tokens} + cpu {self.cpu_tokens} "
            f"+ recomputed {self.recomputed_tokens} + new {self.new_tokens}",
            f"out {self.output_tokens}",
            f"moved {self.bytes_in / 1e6:.1f} MB in, {self.bytes_out / 1e6:.1f} MB out",
            f"queue {1e3 * self.queue_s:.0f} ms, first token {first}, total {1e3 * self.total_s:.0f} ms",
        ]
        if self.truncated_tokens:
            parts.append(f"left out {self.truncated_tokens} tokens")
        if self.suspensions:
            parts.append(
                f"suspended {self.suspensions}x: {self.resume_cpu_tokens} swapped in, "
                f"{self.resume_recomputed_tokens} recomputed again"
            )
        return " | ".join(parts)
