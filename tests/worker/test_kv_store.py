"""Stores allocate what they say, and slots move as opaque bytes."""

from __future__ import annotations

import pytest
import torch

from pensieve.worker import kv_store
from pensieve.worker.kv_store import KVStore, copy_slots

CPU = torch.device("cpu")


def filled(num_slots: int, seed: int) -> KVStore:
    store = KVStore(num_slots, 3, 40, CPU)
    store.data.copy_(torch.randint(256, store.data.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8))
    return store


def test_a_store_is_one_allocation_of_exactly_its_bytes_and_zero() -> None:
    store = KVStore(5, 3, 40, CPU)
    assert store.data.untyped_storage().nbytes() == store.num_bytes == 5 * store.slot_bytes == 5 * 3 * 40
    assert store.data.is_contiguous()
    assert not store.data.any()


def test_a_layer_is_a_view_across_slots() -> None:
    store = KVStore(5, 3, 40, CPU)
    store.layer(1).fill_(7)
    assert store.data[:, 1].eq(7).all() and not store.data[:, 0].any() and not store.data[:, 2].any()
    assert store.layer(1).data_ptr() == store.data.data_ptr() + 40


@pytest.mark.parametrize("piece_bytes", [1, 120, 250, 1 << 20])
def test_slots_copy_whole_or_by_layer_between_any_tiers(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(kv_store, "PIECE_BYTES", piece_bytes)
    source, target = filled(6, 1), filled(4, 2)
    kept = target.data.clone()
    copy_slots(source, [5, 0, 5], target, [1, 3, 0])
    assert torch.equal(target.data[[1, 3, 0]], source.data[[5, 0, 5]])
    assert torch.equal(target.data[2], kept[2])
    copy_slots(source, [2, 4], target, [3, 2], layer=1)
    assert torch.equal(target.data[[3, 2], 1], source.data[[2, 4], 1])
    assert torch.equal(target.data[3, 0], source.data[0, 0]) and torch.equal(target.data[2, 2], kept[2, 2])


def test_an_empty_tier_and_an_empty_copy_are_fine() -> None:
    empty = KVStore(0, 3, 40, CPU)
    assert empty.num_bytes == 0
    copy_slots(filled(2, 1), [], empty, [])


def test_tiers_of_other_chunks_do_not_mix() -> None:
    with pytest.raises(AssertionError, match="different chunks"):
        copy_slots(filled(2, 1), [0], KVStore(2, 3, 44, CPU), [0])
    with pytest.raises(AssertionError, match="cannot go to"):
        copy_slots(filled(2, 1), [0, 1], filled(2, 2), [0])


def test_wiping_makes_those_slots_zero_and_no_other() -> None:
    store = filled(6, 1)
    kept = store.data.clone()
    store.wipe([4, 1])
    assert not store.data[[4, 1]].any()
    assert torch.equal(store.data[[0, 2, 3, 5]], kept[[0, 2, 3, 5]])
    store.wipe([])
