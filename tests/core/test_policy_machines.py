"""Every policy in the state machine of the cache: `check()` and the worst of all by brute force after every step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from test_cache_machine import COST, SIZE, CacheMachine

from pensieve.core.eviction import POLICIES, PolicyFactory
from pensieve.simulator.policies import Setting, make_policy
from policy_worlds import ALL_POLICIES, some_time_later


@pytest.mark.parametrize("name", [name for name in ALL_POLICIES if name != "retention"])
def test_the_cache_agrees_with_itself_under(name: str) -> None:
    class Machine(CacheMachine):
        offered = name in POLICIES

        def policy(self) -> PolicyFactory:
            setting = Setting(
                COST.of_chunk,
                SIZE,
                num_slots=9,
                next_use_s=some_time_later,
                uncached_tokens=10,
                prompt_tokens=2,
            )
            return make_policy(name, setting)

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
