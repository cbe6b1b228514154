"""An OpenAI-compatible server as a chat system. Knows histories and texts; never tokens, or how the server
works.

`compare --baseline-url` measures it: a server that gets the whole history with every turn, as its API
demands. Times are taken on this side of the network. Every fault of server, network or stream becomes a
failed turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from pensieve.bench.chat_client import LENGTH_FORMS, Asked, ChatClient
from pensieve.bench.http_client import HttpClient
from pensieve.bench.probe import find_model
from pensieve.bench.systems import TurnRequest, TurnResult, failed_turn
from pensieve.core.receipt import Receipt


@dataclass(slots=True)
class _History:
    """What was said in one conversation, and its size."""

    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0  # prompt and answer of the last turn, by the server's count


class OpenAISystem:
    """Streams chat completions from a server. Its requests run on an event loop in a thread of its own.

    Sole owner of the conversations' histories. Answers are greedy (temperature 0). The number of cached
    prompt tokens is read from `usage.prompt_tokens_details.cached_tokens` if the server reports it (vLLM does
    with `--enable-prompt-tokens-details`) and counted as found on the GPU. The protocol has no token ids, so
    outputs cannot be compared under the contract.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        name: str = "baseline",
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 600.0,
    ) -> None:
        """Connect to the server at `base_url` (with or without `/v1`).

        Args:
            base_url: `http://host:port` or `http://host:port/v1`.
            model: the name to ask for; None takes the first that the server lists.
            api_key: sent as a bearer token, never shown.
            name: for tables and legends.
            connect_timeout_s: for a connection.
            read_timeout_s: for the next bytes of an answer.

        Raises:
            ConfigError: the URL is not an HTTP URL.
            ModelUnavailable: `model` is None and the server does not list one.
        """
        root = base_url.strip().rstrip("/").removesuffix("/v1")
        http = HttpClient(
            f"{root}/v1", api_key, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s
        )
        self.name = name
        self._lock = threading.Lock()
        self._histories: dict[str, _History] = {}
        self._under_way: set[asyncio.Task[TurnResult]] = set()  # touched by the loop's thread only
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._chat = ChatClient(http, model or "")
        try:
            if model is None:
                listed = asyncio.run_coroutine_threadsafe(find_model(http, None), self._loop)
                self._chat.model, _ = listed.result()
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> str:
        """The name that is asked for."""
        return self._chat.model

    def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
        """Send the history and the turn."""
        submitted_s = time.perf_counter()
        if (text := turn.user_text) is None:
            words = "a server of chat completions takes text, not token ids"
            return _settled(failed_turn("invalid_request", words, submitted_s=submitted_s, total_s=0.0))
        with self._lock:
            if self._closed:
                words = "the system is closed"
                return _settled(failed_turn("cancelled", words, submitted_s=submitted_s, total_s=0.0))
            history = self._histories.setdefault(turn.conversation_id, _History())
            return asyncio.run_coroutine_threadsafe(
                self._answer(turn, text, history, submitted_s), self._loop
            )

    def end_conversation(self, conversation_id: str) -> None:
        """Drop the history."""
        with self._lock:
            self._histories.pop(conversation_id, None)

    def close(self) -> None:
        """Close the connections and fail the turns that are under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way)
        self._chat.http.close()

    async def _answer(
        self, turn: TurnRequest, user_text: str, history: _History, submitted_s: float
    ) -> TurnResult:
        """One turn, from its request to the end of its stream. Does not raise."""
        task: asyncio.Task[TurnResult] | None = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            return await self._ask(turn, user_text, history, submitted_s)
        except asyncio.CancelledError:
            total_s = time.perf_counter() - submitted_s
            words = "closed before the server had answered"
            return failed_turn("cancelled", words, submitted_s=submitted_s, total_s=total_s)
        finally:
            self._under_way.discard(task)

    async def _ask(
        self, turn: TurnRequest, user_text: str, history: _History, submitted_s: float
    ) -> TurnResult:
        messages = history.messages
        if turn.system_text is not None and not messages:
            messages.append({"role": "system", "content": turn.system_text})
        if turn.forced_answer is not None and messages and messages[-1]["role"] == "assistant":
            messages[-1]["content"] = turn.forced_answer
        question = {"role": "user", "content": user_text}
        # a server that ignores the fields for a fixed length ends its answers where its model does
        form = LENGTH_FORMS[0] if turn.fixed_length else ()
        asked = await self._chat.ask([*messages, question], turn.max_new_tokens, length_form=form)
        if (failure := asked.failure) is not None:
            return failed_turn(
                failure.code,
                failure.message,
                submitted_s=submitted_s,
                total_s=asked.ended_s - submitted_s,
                text=asked.answer.text,
            )
        messages += [question, {"role": "assistant", "content": asked.answer.text}]
        return _result(asked, history, submitted_s)


def _settled(result: TurnResult) -> Future[TurnResult]:
    future: Future[TurnResult] = Future()
    future.set_result(result)
    return future


def _result(asked: Asked, history: _History, submitted_s: float) -> TurnResult:
    answer, total_s = asked.answer, asked.ended_s - submitted_s
    first_token_s = None if answer.first_s is None else answer.first_s - submitted_s
    prompt_tokens, output_tokens, cached = answer.prompt_tokens, answer.output_tokens, answer.cached_tokens
    receipt = None
    if prompt_tokens is not None and cached is not None:
        recomputed = max(0, min(history.tokens, prompt_tokens) - cached)
        receipt = Receipt(
            prompt_tokens=prompt_tokens,
            gpu_tokens=cached,
            recomputed_tokens=recomputed,
            new_tokens=prompt_tokens - cached - recomputed,
            output_tokens=output_tokens or answer.num_pieces,
            first_token_s=first_token_s,
            total_s=total_s,
        )
    history.tokens = (prompt_tokens or 0) + (output_tokens or 0)
    reason = answer.finish_reason or "stop"
    counted = output_tokens if output_tokens is not None else answer.num_pieces
    return TurnResult(
        (),
        (),
        answer.text,
        (),
        (),
        submitted_s,
        None,
        first_token_s,
        total_s,
        receipt,
        reason,
        reported_output_tokens=counted,
    )
