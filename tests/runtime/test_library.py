"""`from pensieve import Pensieve`: conversations of a library's user, with a tiny model that has a tokenizer."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from text_tokenizers import CHATML, hugging_face

from pensieve import Pensieve, SamplingParams
from pensieve.errors import ConfigError, EngineClosed, InvalidRequest
from tiny_models import tiny

SMALL: dict[str, Any] = {"gpu_cache_gb": 0.004, "dtype": "float32", "threads": 1, "debug": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = hugging_face(CHATML)
    size = len(tokenizer) + len(tokenizer) % 2
    tiny("llama", vocab_size=size, max_position_embeddings=2048).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[Pensieve]:
    with Pensieve(folder, **SMALL) as loaded:
        yield loaded


def test_importing_the_front_door_imports_no_torch() -> None:
    code = "import sys; from pensieve import Pensieve, SamplingParams; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_second_turn_finds_the_first_in_the_cache(llm: Pensieve) -> None:
    chat = llm.conversation()
    assert chat.receipt is None and chat.messages == ()
    first = chat.send("What is the capital of France?", max_tokens=40)
    assert first.receipt.gpu_tokens == 0 and first.receipt.output_tokens <= 40
    second = chat.send("And of Italy?", max_tokens=5)
    assert chat.receipt is second.receipt
    assert second.receipt.gpu_tokens >= len(first.prompt)  # the last token of an answer has no KV yet
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1].content == first.text


def test_a_stream_says_what_an_answer_at_once_says(llm: Pensieve) -> None:
    whole = llm.conversation().send("Tell me a story.", max_tokens=30)
    chat = llm.conversation()
    pieces = list(chat.stream("Tell me a story.", max_tokens=30))
    assert "".join(piece.text for piece in pieces) == whole.text and all(piece.text for piece in pieces)
    assert chat.last is not None and chat.last.text == whole.text


def test_leaving_a_stream_ends_the_answer_and_keeps_what_was_said(llm: Pensieve) -> None:
    chat = llm.conversation()
    stream = chat.stream("Go on.", max_tokens=400)
    said = next(stream).text
    stream.close()
    assert chat.last is not None and chat.last.text.startswith(said)
    assert chat.last.receipt.output_tokens < 400
    assert chat.messages[-1].content == chat.last.text
    assert chat.send("And then?", max_tokens=3).receipt.gpu_tokens > 0


def test_a_system_message_is_said_once(llm: Pensieve) -> None:
    chat = llm.conversation(system="Be short.")
    chat.send("Hello.", max_tokens=2)
    chat.send("Hello again.", max_tokens=2)
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_sampling_and_stop_strings_are_passed_on(llm: Pensieve) -> None:
    whole = llm.conversation().send("Hello.", max_tokens=12)
    stop = whole.text[3:5]
    cut = llm.conversation().send("Hello.", max_tokens=12, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    drawn = SamplingParams(temperature=1.5, seed=3, max_new_tokens=12)
    first, second = (llm.conversation().send("Hello.", sampling=drawn).text for _ in range(2))
    assert first == second


def test_what_cannot_be_answered_changes_nothing(llm: Pensieve) -> None:
    chat = llm.conversation()
    chat.send("Hello.", max_tokens=2)
    before = chat.messages
    with pytest.raises(InvalidRequest, match="max_new_tokens must be at least 1"):
        chat.send("More.", max_tokens=0)
    with pytest.raises(InvalidRequest, match="must be a string, got int"):
        chat.send(7)  # type: ignore[arg-type]
    assert chat.messages == before


def test_conversations_of_several_threads_do_not_disturb_each_other(llm: Pensieve) -> None:
    alone = [llm.conversation().send(f"Number {n}.", max_tokens=20).text for n in range(4)]
    together: dict[int, str] = {}

    def ask(n: int) -> None:
        together[n] = llm.conversation().send(f"Number {n}.", max_tokens=20).text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(4)] == alone


def test_with_a_store_a_conversation_goes_on_after_a_restart(folder: str, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'chats.db'}"
    with Pensieve(folder, store=store, **SMALL) as llm:
        llm.conversation("trip").send("Hello.", max_tokens=20)
        said = llm.conversation("trip").messages
    with Pensieve(folder, store=store, **SMALL) as llm:
        chat = llm.conversation("trip")
        assert chat.messages == said
        answer = chat.send("Go on.", max_tokens=2)
        assert answer.receipt.recomputed_tokens > 0 and answer.receipt.gpu_tokens == 0
        erased = chat.delete()
        assert erased.turns == 2 and chat.messages == ()


def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'gpu_cash_gb'.*gpu_cache_gb"):
        Pensieve(gpu_cash_gb=1)
    with pytest.raises(ConfigError, match=":memory: keeps nothing on disk"):
        Pensieve(str(tmp_path), store="memory")


def test_a_closed_one_says_so(folder: str) -> None:
    llm = Pensieve(folder, **SMALL)
    chat = llm.conversation()
    llm.close()
    llm.close()
    with pytest.raises(EngineClosed, match="was closed"):
        chat.send("Hello.")
