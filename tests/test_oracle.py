"""Cached logits equal recomputed logits: seven architectures, random histories of the cache, failures, and the real default model."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import Lab, assert_answer_is_stateless, eager_logits, pair, random_play
from pensieve.core.plan import Copy
from pensieve.core.request import FinishReason
from pensieve.worker.gate import admit
from pensieve.worker.kv_store import SlotCopy
from pensieve.worker.worker import Hooks
from tiny_models import ARCHITECTURES

cached_pair = functools.cache(pair)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 32), faults=st.booleans())
def test_any_history_of_the_cache_gives_the_stateless_answer(
    architecture: str, seed: int, faults: bool
) -> None:
    model, reference = cached_pair(architecture)
    random_play(model, reference, seed, faults=faults).close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dropped_prefix_and_a_hole_are_recomputed_with_the_new_prompt(architecture: str) -> None:
    model, reference = cached_pair(architecture)
    lab = Lab(model, (16, 16))
    prompt = [(7 * i) % model.config.vocab_size for i in range(60)]
    lab.submit("first", "c", prompt, 5)
    lab.run()
    sequence = lab.cache.find("n", "c")
    assert sequence is not None
    for position in (0, 1, 4):  # a leading piece and a hole
        chunk = sequence.chunks[position]
        assert chunk is not None
        if chunk.slots[1] is not None:
            lab.cache.places.release_lower(chunk, 1)
        lab.cache.places.drop(chunk)
    log = lab.done["first"].tokens
    lab.submit("second", "c", [*log, 3, 1, 4, 1, 5], 6, len(log))
    lab.run()
    second = lab.done["second"]
    assert second.receipt.recomputed_tokens == 3 * 8 + 1
    assert second.receipt.new_tokens == 5
    assert second.receipt.gpu_tokens == len(log) - 1 - 3 * 8
    assert_answer_is_stateless(reference, second)
    lab.close()


def test_a_copy_that_raises_becomes_a_recompute() -> None:
    model, reference = cached_pair("llama")

    def refuse(copy: Copy) -> None:
        if copy.dst_tier == 0:
            raise OSError("injected")

    lab = Lab(model, (10, 30), hooks=Hooks(before_copy=refuse))
    vocab = model.config.vocab_size
    logs = {}
    for name in ("a", "b"):
        lab.submit(name, name, [(ord(name) * 31 + 5 * i) % vocab for i in range(50)], 4)
        lab.run()
        logs[name] = lab.done[name].tokens
    lab.submit("again", "a", logs["a"] + [1, 2, 3], 6, len(logs["a"]))
    lab.run()
    again = lab.done["again"]
    assert lab.scheduler.num_copies_failed > 0
    assert again.ending is FinishReason.LENGTH
    assert again.receipt.resume_recomputed_tokens > 0
    assert_answer_is_stateless(reference, again)
    lab.close()


def test_a_forward_that_raises_poisons_nothing_and_a_broken_request_fails_alone() -> None:
    model, reference = cached_pair("llama")

    def refuse(plan: object) -> None:
        if any(span.token_ids and 13 in span.token_ids and span.request_id == "bad" for span in plan.spans):  # type: ignore[attr-defined]
            raise RuntimeError("injected: this prompt breaks the forward")

    lab = Lab(model, (40, 10), hooks=Hooks(before_forward=refuse))
    lab.submit("good", "g", [2, 4, 6, 8, 10, 12], 20)
    lab.step()
    lab.submit("bad", "b", [11, 13, 17], 5)
    lab.submit("other", "o", [1, 3, 5, 7, 9], 20)
    lab.run()
    assert lab.done["bad"].ending is FinishReason.ERROR
    assert "breaks the forward" in (lab.done["bad"].error or "")
    for name in ("good", "other"):
        assert len(lab.done[name].output) == 20
        assert_answer_is_stateless(reference, lab.done[name])
    lab.close()


def test_a_request_that_raises_in_sampling_fails_alone() -> None:
    model, reference = cached_pair("llama")

    def refuse(request_id: str) -> None:
        if request_id == "bad":
            raise RuntimeError("injected in sampling")

    lab = Lab(model, (40, 10), hooks=Hooks(before_sample=refuse))
    lab.submit("good", "g", [2, 4, 6, 8, 10, 12], 20)
    lab.submit("bad", "b", [11, 13, 17], 5)
    lab.run()
    assert lab.done["bad"].ending is FinishReason.ERROR
    assert "injected in sampling" in (lab.done["bad"].error or "")
    assert_answer_is_stateless(reference, lab.done["good"])
    assert len(lab.done["good"].output) == 20
    lab.close()


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: a swap-in that fetches the wrong bytes is seen."""
    model, reference = cached_pair("llama")
    lab = Lab(model, (10, 30))
    vocab = model.config.vocab_size
    for name in ("a", "b"):
        lab.submit(name, name, [(ord(name) * 31 + 5 * i) % vocab for i in range(50)], 4)
        lab.run()
    copy_layer = SlotCopy.layer

    def copy_wrong(move: SlotCopy, layer: int) -> None:
        wrong = [(slot + 1) % move._source.num_slots for slot in move._source_slots]
        copy_layer(SlotCopy(move._source, wrong, move._target, move._target_slots), layer)

    monkeypatch.setattr(SlotCopy, "layer", copy_wrong)
    log = lab.done["a"].tokens
    lab.submit("again", "a", [*log, 1, 2, 3], 6, len(log))
    lab.run()
    assert lab.done["again"].receipt.cpu_tokens > 0
    with pytest.raises(AssertionError, match="a stateless run gives"):
        assert_answer_is_stateless(reference, lab.done["again"])
    lab.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_bfloat16_stays_within_its_tolerance_teacher_forced(architecture: str) -> None:
    """In bf16 the shape of a batch alone flips near-ties, so logits are compared, on the same ids; 3 % of the largest."""
    from tiny_models import tiny

    model = admit(tiny(architecture, 0, torch.bfloat16), label=architecture)
    reference = tiny(architecture, 0, torch.bfloat16)
    reference.set_attn_implementation("eager")
    lab = Lab(model, (10, 20))
    log: list[int] = []
    for turn in range(4):
        prompt = log + [(turn * 17 + 5 * i) % model.config.vocab_size for i in range(13)]
        lab.submit(f"t{turn}", "c", prompt, 5, len(log))
        lab.run()
        log = lab.done[f"t{turn}"].tokens
    logits = eager_logits(reference, log)
    last = lab.done["t3"]
    for position, token in enumerate(last.output, start=last.num_prompt):
        row = logits[position - 1]
        assert float(row.max() - row[token]) <= 0.03 * float(row.abs().max())
    lab.close()


@pytest.mark.model
def test_the_default_model_over_five_turns_equals_generate_on_the_full_history() -> None:
    from pensieve.worker.weights import load, resolve

    resolved = resolve("smollm2")
    reference = load(resolved, "float32")
    model = admit(load(resolved, "float32"), label="smollm2")
    lab = Lab(model, (9, 12), chunk_tokens=32, max_context=512)
    log: list[int] = []
    for turn in range(5):
        new = [(1000 * turn + 37 * i) % 40_000 + 100 for i in range(23)]
        other = [(500 * turn + 91 * i) % 40_000 + 100 for i in range(120)]
        lab.submit(f"t{turn}", "c", log + new, 8, len(log))
        lab.submit(f"o{turn}", f"o{turn}", other, 4)  # pressure, so that the history moves
        lab.run()
        request = lab.done[f"t{turn}"]
        with torch.inference_mode():
            full = reference.generate(
                torch.tensor([log + new]),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0].tolist()
        if request.tokens != full:
            assert_answer_is_stateless(reference, request)  # equal up to near-ties, shown by logits
        log = request.tokens
    assert lab.done["t4"].receipt.gpu_tokens < len(log)
    lab.close()
