"""A hand-written history of plans equals a fresh stateless run, for every architecture and backend."""

from __future__ import annotations

import pytest
import torch

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.attention import BACKENDS
from pensieve.worker.model import CausalModel
from tiny_models import ARCHITECTURES, tiny
from worker_plans import Driver, eager_logits, relative_error, some_ids


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> CausalModel:
    torch.set_num_threads(1)
    return CausalModel(tiny(request.param), request.param, self_test=False)


@pytest.mark.parametrize("attention", sorted(BACKENDS))
def test_a_history_of_plans_equals_a_stateless_run(model: CausalModel, attention: str) -> None:
    """In pieces, decoding, out and in, with a dropped prefix and a hole computed in the same forward as the new prompt."""
    driver = Driver(model, 20, 8, attention=attention)
    a, b = list(some_ids(22, 1)), list(some_ids(9, 2))
    driver.start("a", a, (9, 2, 14, 5, 0, 11, 16))  # chunks of 4
    driver.start("b", b, (3, 8, 1))
    driver.run(Span("a", 0, 8, tuple(a[:8]), False), Span("b", 0, 9, tuple(b), True))
    result = driver.run(Span("a", 8, 22, tuple(a[8:]), True), Span("b", 9, 10, None, True))
    b.append(int(driver.logits["b", 8].argmax()))
    driver.tables.append(BlockTableUpdate("b", 3, (19,)))
    for _ in range(3):  # both decode; "a" is asked for by id, "b" by "the token sampled last"
        sampled = {token.request_id: token.token_id for token in result.tokens}
        a.append(sampled["a"])
        b.append(sampled["b"])
        result = driver.run(Span("a", len(a) - 1, len(a), (a[-1],), True), Span("b", len(b) - 1, len(b), None, True))
    # "a" leaves the first tier but for chunk 2; chunks 0, 4 and 6 are dropped, the others come back to other slots.
    out = [driver.copy((0, slot), (1, place)) for slot, place in ((2, 6), (5, 0), (11, 3))]  # chunks 1, 3, 5
    driver.settle({copy.copy_id for copy in out}, [driver.run(swap_out=out)])
    for slot in (9, 2, 5, 0, 11, 16):
        driver.worker._stores[0].data[slot] = 0xFF  # NaN in every floating dtype
    b.append(next(token.token_id for token in result.tokens if token.request_id == "b"))
    a += some_ids(10, 3)
    driver.start("a2", a, (4, 7, 14, 10, 6, 12, 13, 15, 2))
    back = [driver.copy((1, place), (0, slot)) for slot, place in ((7, 6), (10, 0), (12, 3))]
    result = driver.run(
        Span("a2", 0, 4, tuple(a[:4]), False), Span("a2", 16, 20, tuple(a[16:20]), False), Span("a2", 24, 35, tuple(a[24:]), True),
        Span("b", len(b) - 1, len(b), None, True),
        swap_in=back, ended=["a"],
    )  # fmt: skip
    assert set(result.copies_done) == {copy.copy_id for copy in back}
    driver.close()
    expected = {"a": eager_logits(model, a), "a2": eager_logits(model, a), "b": eager_logits(model, b)}
    assert len(driver.logits) == 1 + 3 + 1 + 6
    for (name, position), logits in driver.logits.items():
        assert relative_error(logits, expected[name][position]) < 1e-4, (name, position)
