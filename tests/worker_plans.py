"""Plans written by hand, against what the model itself says of the same ids."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.worker.batch import Batch
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import Hooks, ModelWorker

CHUNK = 4
GREEDY = SamplingParams(logprobs=20)


def some_ids(count: int, seed: int = 0, vocab: int = 199) -> tuple[int, ...]:
    return tuple(torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


class Driver:
    """A worker, and a plan for each call. Keeps the logits of every step."""

    def __init__(
        self,
        model: CausalModel,
        *slots: int,
        attention: str = "auto",
        hooks: Hooks = Hooks(),
        make_worker: Callable[..., Any] = ModelWorker,
    ) -> None:
        self.model = model
        tiers = tuple(
            TierConfig(name, count) for name, count in zip(("gpu", "cpu", "disk"), slots, strict=False)
        )
        self.worker = make_worker(model, tiers, CHUNK, attention=attention, hooks=hooks)
        self.steps = itertools.count()
        self.copies = itertools.count()
        self.started: list[RequestStart] = []
        self.tables: list[BlockTableUpdate] = []
        self.logits: dict[tuple[str, int], torch.Tensor] = {}  # (request, position) -> (V,)
        self._forward = model.forward
        model.forward = self._spy  # type: ignore[method-assign]

    def _spy(self, batch: Batch, attending: Any) -> torch.Tensor:
        logits = self._forward(batch, attending)
        for span, row in zip(batch.emitting, logits, strict=True):
            self.logits[span.request_id, span.stop - 1] = row.float().clone()
        return logits

    def start(
        self, request_id: str, prompt: Sequence[int], slots: Sequence[int], sampling: SamplingParams = GREEDY
    ) -> None:
        self.started.append(RequestStart(request_id, sampling, tuple(prompt)))
        self.tables.append(BlockTableUpdate(request_id, 0, tuple(slots)))

    def copy(self, src: tuple[int, int], dst: tuple[int, int]) -> Copy:
        return Copy(next(self.copies), *src, *dst)

    def run(
        self,
        *spans: Span,
        swap_in: Sequence[Copy] = (),
        swap_out: Sequence[Copy] = (),
        ended: Sequence[str] = (),
        wiped: Sequence[tuple[int, int]] = (),
        settles: bool = False,
    ) -> StepResult:
        plan = StepPlan(
            next(self.steps), spans, tuple(swap_in), tuple(swap_out), tuple(self.started), tuple(self.tables), tuple(ended), (), tuple(wiped), settles
        )  # fmt: skip
        self.started, self.tables = [], []
        result: StepResult = self.worker.run(pickle.loads(pickle.dumps(plan)))
        return result

    def settle(self, copy_ids: set[int], results: list[StepResult] | None = None) -> list[StepResult]:
        """Run empty plans until these copies were reported."""
        results = results or []
        for _ in range(10_000):
            reported = {copy_id for result in results for copy_id in result.copies_done}
            reported |= {failure.copy_id for result in results for failure in result.copies_failed}
            if copy_ids <= reported:
                return results
            results.append(self.run())
        raise AssertionError(f"copies {copy_ids - reported} never settled")

    def close(self) -> None:
        self.worker.close()
        self.model.forward = self._forward  # type: ignore[method-assign]


def eager_logits(model: CausalModel, ids: Sequence[int]) -> torch.Tensor:
    """(n, V): what a fresh stateless run computes."""
    with torch.inference_mode(), model.eager() as eager:
        logits: torch.Tensor = eager(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.float()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())
