"""Separate steps for prompts and for decodes, as servers had them before batches were unified. Knows spans; never costs.

For comparison only (paper, Fig. 13, and its baselines): while any admitted prompt is not computed, decodes wait.
"""

from __future__ import annotations

from pensieve.core.scheduler import Scheduler, _Step


class PhasedScheduler(Scheduler):
    """The scheduler, but for what goes into one step."""

    def _fill(self, step: _Step, now_s: float) -> None:
        self._admit(step, now_s)
        prompts = sorted(
            (request for request in self.running if request.missing),
            key=lambda request: (request.due, request.arrival),
        )
        for request in prompts:
            self._plan_missing(step, request)
        if not step.spans:
            for request in list(self.running):
                self._plan_decode(step, request, now_s)
