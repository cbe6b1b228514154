"""What became of every request of a simulation, and what follows from it. Knows times and token counts; never
schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pensieve.core.receipt import Receipt
from pensieve.reporting.spread import Spread


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One turn that was sent. Times in seconds of the simulation."""

    conversation: str
    turn: int
    sent_s: float
    finished_s: float
    history_tokens: int
    receipt: Receipt  # without misses
    error: str | None = None

    @property
    def latency_s(self) -> float:
        """From sending to the last token."""
        return self.finished_s - self.sent_s

    @property
    def normalized_s(self) -> float:
        """End-to-end latency over output tokens (paper, evaluation)."""
        return self.latency_s / self.receipt.output_tokens

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        assert self.receipt.first_token_s is not None
        return self.receipt.first_token_s


@dataclass(frozen=True, slots=True)
class Summary:
    """A window of a simulation: requests sent in it, tokens computed for them, and what the device did."""

    window_s: tuple[float, float]
    sent: int
    failed: int
    sent_per_s: float
    finished_per_s: float  # requests whose end lies in the window: the paper's throughput
    output_tokens_per_s: float  # of these
    normalized_s: Spread
    ttft_s: Spread
    latency_s: Spread
    gpu_share: float  # of history tokens: found in the first tier
    cpu_share: float  # swapped in
    recomputed_share: float
    recomputed_tokens: int
    history_tokens: int
    again_computed_tokens: int  # after suspensions
    suspensions: int


def summarize(records: Sequence[RequestRecord], begin_s: float, end_s: float) -> Summary:
    """The window [begin_s, end_s) of a simulation."""
    sent = [record for record in records if begin_s <= record.sent_s < end_s]
    answered = [record for record in sent if record.error is None]
    ended = [record for record in records if record.error is None and begin_s <= record.finished_s < end_s]
    history = sum(record.history_tokens for record in answered)

    def share(tokens: int) -> float:
        return tokens / history if history else 0.0

    receipts = [record.receipt for record in answered]
    found = sum(receipt.gpu_tokens for receipt in receipts)
    swapped = sum(receipt.cpu_tokens for receipt in receipts)
    recomputed = sum(receipt.recomputed_tokens for receipt in receipts)
    span_s = end_s - begin_s
    return Summary(
        window_s=(begin_s, end_s),
        sent=len(sent),
        failed=len(sent) - len(answered),
        sent_per_s=len(sent) / span_s,
        finished_per_s=len(ended) / span_s,
        output_tokens_per_s=sum(record.receipt.output_tokens for record in ended) / span_s,
        normalized_s=Spread.of([record.normalized_s for record in answered]),
        ttft_s=Spread.of([record.ttft_s for record in answered]),
        latency_s=Spread.of([record.latency_s for record in answered]),
        gpu_share=share(found),
        cpu_share=share(swapped),
        recomputed_share=share(recomputed),
        recomputed_tokens=recomputed,
        history_tokens=history,
        again_computed_tokens=sum(receipt.resume_recomputed_tokens for receipt in receipts),
        suspensions=sum(receipt.suspensions for receipt in receipts),
    )
