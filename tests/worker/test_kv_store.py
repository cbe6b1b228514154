"""Stores allocate what they say, and slots move as opaque bytes."""

from __future__ import annotations

import gc

import pytest
import torch

from pensieve.errors import ConfigError
from pensieve.worker import gather, kv_store
from pensieve.worker.kv_store import KVStore, SlotCopy, runs

CPU = torch.device("cpu")


def filled(num_slots: int, seed: int) -> KVStore:
    store = KVStore(num_slots, 3, 40, CPU)
    store.data.copy_(
        torch.randint(256, store.data.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    )
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
def test_slots_copy_whole_or_by_layer_between_any_tiers(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(kv_store, "PIECE_BYTES", piece_bytes)
    source, target = filled(6, 1), filled(4, 2)
    kept = target.data.clone()
    SlotCopy(source, [5, 0, 5], target, [1, 3, 0]).whole()
    assert torch.equal(target.data[[1, 3, 0]], source.data[[5, 0, 5]])
    assert torch.equal(target.data[2], kept[2])
    SlotCopy(source, [2, 4], target, [3, 2]).layer(1)
    assert torch.equal(target.data[[3, 2], 1], source.data[[2, 4], 1])
    assert torch.equal(target.data[3, 0], source.data[0, 0]) and torch.equal(target.data[2, 2], kept[2, 2])


def test_an_empty_tier_and_an_empty_copy_are_fine() -> None:
    empty = KVStore(0, 3, 40, CPU)
    assert empty.num_bytes == 0
    SlotCopy(filled(2, 1), [], empty, []).whole()


def test_tiers_of_other_chunks_do_not_mix() -> None:
    with pytest.raises(AssertionError, match="different chunks"):
        SlotCopy(filled(2, 1), [0], KVStore(2, 3, 44, CPU), [0])
    with pytest.raises(AssertionError, match="cannot go to"):
        SlotCopy(filled(2, 1), [0, 1], filled(2, 2), [0])


def test_wiping_makes_those_slots_zero_and_no_other() -> None:
    store = filled(6, 1)
    kept = store.data.clone()
    store.wipe([4, 1])
    assert not store.data[[4, 1]].any()
    assert torch.equal(store.data[[0, 2, 3, 5]], kept[[0, 2, 3, 5]])
    store.wipe([])


def test_neighbours_that_go_to_neighbours_are_one_copy() -> None:
    assert list(runs([3, 4, 5, 9, 10, 2], [7, 8, 9, 0, 2, 3])) == [
        (3, 7, 3),
        (9, 0, 1),
        (10, 2, 1),
        (2, 3, 1),
    ]
    assert list(runs([], [])) == []


def test_runs_copy_what_slot_by_slot_would() -> None:
    """What crosses a link, on a CPU."""
    source, target = filled(9, 1), filled(9, 2)
    kept = target.data.clone()
    SlotCopy(source, [1, 2, 3, 7], target, [4, 5, 6, 0])._copy_runs(None)
    assert torch.equal(target.data[[4, 5, 6, 0]], source.data[[1, 2, 3, 7]]) and torch.equal(
        target.data[[1, 2, 3, 7, 8]], kept[[1, 2, 3, 7, 8]]
    )
    SlotCopy(source, [5, 6], target, [1, 2])._copy_runs(2)
    assert torch.equal(target.data[[1, 2], 2], source.data[[5, 6], 2]) and torch.equal(
        target.data[[1, 2], :2], kept[[1, 2], :2]
    )


@pytest.mark.parametrize("layer_bytes", [8, 40, 24_000])
def test_the_gathering_kernel_copies_one_layer(layer_bytes: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, target = KVStore(7, 3, layer_bytes, device), KVStore(9, 3, layer_bytes, device)
    source.data.copy_(
        torch.randint(256, source.data.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    )
    assert gather.why_not(source.layer_bytes) is None
    sources, targets = [6, 0, 3], [8, 1, 0]
    gather.copy_layer(source.layer(1), target.layer(1), torch.tensor([sources, targets], device=device))
    assert torch.equal(target.data[targets, 1], source.data[sources, 1])
    others = [slot for slot in range(9) if slot not in targets]
    assert not target.data[others].any() and not target.data[:, 0].any() and not target.data[:, 2].any()


def test_a_layer_that_is_no_whole_number_of_words_is_left_to_plain_copies() -> None:
    store = KVStore(2, 1, 12, CPU)
    assert gather.why_not(store.layer_bytes) == "12 bytes are not whole words of 8"


class FakeRuntime:
    """CUDA's page locking, as far as it is used."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0
        self.locked[address] = num_bytes
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]


def test_a_tier_for_a_device_is_page_locked_for_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    store = KVStore(5, 3, 40, CPU, pinned=True)
    assert runtime.locked == {store.data.data_ptr(): store.num_bytes}, "exactly its bytes, not rounded up"
    assert not store.data.any()
    del store
    gc.collect()
    assert runtime.locked == {}


def test_memory_that_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeRuntime(2))
    with pytest.raises(
        ConfigError, match=r"0\.00 GB of main memory cannot be page-locked for the device \(CUDA error 2\)"
    ):
        KVStore(5, 3, 40, CPU, pinned=True)


def test_checksums_tell_contents_apart() -> None:
    store = filled(6, 1)
    sums = store.checksums([0, 1, 0]).tolist()
    assert sums[0] == sums[2] != sums[1]
    for byte in range(store.slot_bytes):
        before = int(store.checksums([3])[0])
        store.data.view(6, -1)[3, byte] ^= 1 << (byte % 8)
        assert int(store.checksums([3])[0]) != before
