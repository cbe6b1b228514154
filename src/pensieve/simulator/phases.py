"""Separate steps for prefill and for decodes, as servers had them before batches were unified. Knows spans;
never costs.

For comparison only (paper, Fig. 13, and its baselines): while any admitted request has prefill left, decodes
wait.
"""

from __future__ import annotations

from pensieve.core.draft import StepDraft
from pensieve.core.filling import Filling


class PhasedFilling(Filling):
    """Each step holds either prefill or decodes."""

    def fill(self, draft: StepDraft) -> None:
        """Spans for one phase."""
        self.admission.admit_all(draft)
        prompts = sorted((r for r in self.running if r.missing), key=lambda r: (r.due, r.arrival))
        for request in prompts:
            self.plan_missing(draft, request)
        if not draft.spans:
            for request in list(self.running):
                self.plan_decode(draft, request)
