"""A plan while it is being filled. Knows the values of a plan; decides nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pensieve.core.plan import BlockTableUpdate, RequestStart, Span
from pensieve.core.request import Request


@dataclass(slots=True)
class StepDraft:
    """Written by admission control and by the filling strategy."""

    step_id: int
    now_s: float
    budget: int  # tokens left
    prefill_s: float = math.inf  # seconds left for prefill; 0 leaves only prefill that ends within one step
    num_prefill: int = 0  # tokens of prefill spans
    spans: list[Span] = field(default_factory=list)
    tables: list[BlockTableUpdate] = field(default_factory=list)
    started: list[RequestStart] = field(default_factory=list)
    named: list[Request] = field(default_factory=list)
    num_unmet: int = 0  # running requests that found no slot for their next token

    def add(self, request: Request, span: Span) -> None:
        """Compute a span of a request in this step."""
        self.spans.append(span)
        self.budget -= span.stop - span.start
        request.num_pending += span.emits_token
        if not self.named or self.named[-1] is not request:
            self.named.append(request)
