"""A real server whose engine is stopped, killed, or finds no model when it is started again: clients get
their answers and their errors in time.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from real import RealServer
from transformers import AutoTokenizer

from pensieve.worker.weights import resolve
from tiny_models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.model]

ENGINE_S = 4.0  # --engine-timeout
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has the embedded one's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    found = resolve(
        "smollm2",
        "auto",
        dtype="float32",
        device="cpu",
        allow_random=False,
        progress=lambda what, share: None,
    )
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer_dir)
    tiny("llama", vocab_size=found.config.vocab_size, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(tmp_path: Path, model: Path) -> Iterator[RealServer]:
    running = RealServer(
        tmp_path / "store.db", "--model", str(model), "--name", "tiny", "--engine-timeout", str(ENGINE_S), "--operation-timeout", "1",
        "--queue-timeout", "30",
    )  # fmt: skip
    running.start()
    try:
        yield running
    finally:
        running.close()


def ask(server: RealServer, content: str = "hello", n: int = 4, **headers: str) -> httpx.Response:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": n,
        "temperature": 0,
        "ignore_eos": True,
    }
    return server.post(CHAT, body, **headers)


def restarts(server: RealServer) -> int:
    return int(server.client.get("/ready").json()["engine_restarts"])


def test_a_frozen_engine_is_replaced_and_nothing_waits_for_it(server: RealServer) -> None:
    conversation = ask(server).json()["pensieve"]["conversation"]
    streams: list[str] = []

    def stream() -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "go on"}],
            "max_tokens": 500,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as response:
            streams.append(response.read().decode())

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    engine = server.engine()
    engine.suspend()
    began_s = time.monotonic()
    for method, path in (
        ("GET", "/v1/pensieve/map"),
        ("GET", "/v1/pensieve/conversations"),
        ("POST", f"/v1/pensieve/conversations/{conversation}/warm"),
    ):
        response = server.client.request(method, path)
        assert response.status_code == 503 and response.json()["error"]["code"] in (
            "engine_timeout",
            "engine_restarted",
        ), path
    deleted = server.client.delete(f"/v1/conversations/{conversation}")
    assert deleted.status_code == 200 and deleted.json()["deleted"]
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - began_s < ENGINE_S + 20
    assert all("engine_restarted" in text or "[DONE]" in text for text in streams) and len(streams) == 4
    server.wait_ready(60)
    assert restarts(server) == 1 and not engine.is_running()
    assert ask(server, "and now").status_code == 200
    server.until_idle()


def test_a_whole_server_that_stood_still_goes_on_with_the_engine_it_had(server: RealServer) -> None:
    assert ask(server).status_code == 200
    everything = [psutil.Process(server.process.pid), server.engine()]
    pid = everything[1].pid
    for process in everything:
        process.suspend()
    time.sleep(3 * ENGINE_S)
    for process in reversed(everything):
        process.resume()
    time.sleep(1.5 * ENGINE_S)
    assert ask(server, "and now").status_code == 200
    assert restarts(server) == 0 and server.engine().pid == pid


def test_a_restart_whose_model_is_missing_works_when_it_is_back(server: RealServer, model: Path) -> None:
    assert ask(server).status_code == 200
    away = model.with_name("away")
    shutil.move(model, away)
    try:
        os.kill(server.engine().pid, signal.SIGKILL)
        until_s = time.monotonic() + 12.0
        seen = set()
        while time.monotonic() < until_s:
            seen.add((server.client.get("/ready").status_code, server.client.get("/ready").json()["status"]))
            time.sleep(0.2)
        assert (503, "restarting") in seen and (503, "failed") not in seen
        response = httpx.post(server.url + "/v1/pensieve/check", timeout=30)
        assert (
            response.status_code == 503
            and response.headers["retry-after"]
            and str(model) not in response.text
        )
    finally:
        shutil.move(away, model)
    server.wait_ready(90)
    assert ask(server, "and now").status_code == 200
    assert len(server.client.get("/v1/pensieve/conversations").json()["data"]) == 2
