"""An OpenAI-compatible server as a chat system. Knows HTTP, server-sent events and text; never tokens, or how the server works.

It is what `compare --baseline-url` measures: a server that is sent the whole history with every turn, as its API demands.
Times are taken on this side of the network. Whatever the server, the network or the stream does wrong becomes a failed turn.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pensieve.bench.chat_stream import EventSplitter, StreamedAnswer, TurnFailed, refusal
from pensieve.bench.systems import TurnRequest, TurnResult, failed_turn
from pensieve.engine.messages import Receipt
from pensieve.errors import ConfigError, ModelUnavailable


@dataclass(slots=True)
class _History:
    """What was said in one conversation, and what the server told of its size."""

    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0  # prompt and answer of the last turn, by the server's count


class OpenAISystem:
    """Streams chat completions from a server, one thread for each turn under way.

    Sole owner of the conversations' histories. Answers are greedy (temperature 0). Tokens found in the server's cache are
    read from `usage.prompt_tokens_details.cached_tokens` where the server reports it (vLLM does with
    `--enable-prompt-tokens-details`); they are counted as found on the gpu. Token ids are not told by this
    protocol, so outputs cannot be compared under the contract.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        name: str = "baseline",
        max_concurrent: int = 256,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 600.0,
    ) -> None:
        """Connect to the server at `base_url` (with or without `/v1`).

        Args:
            base_url: `http://host:port` or `http://host:port/v1`.
            model: the name to ask for; None takes the first that the server lists.
            api_key: sent as a bearer token, never shown.
            name: for tables and legends.
            max_concurrent: connections at once; more turns wait for one here, and their waiting counts.
            connect_timeout_s: for a connection.
            read_timeout_s: for the next bytes of an answer.

        Raises:
            ConfigError: the URL is not one of HTTP, or `httpx` is not installed.
            ModelUnavailable: the model's name must be asked for and the server does not answer.
        """
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("a baseline over HTTP needs the package httpx: pip install httpx") from error
        root = base_url.rstrip("/")
        if not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", root):
            raise ConfigError(
                f"the baseline's URL must look like http://host:port or http://host:port/v1, got {base_url!r}"
            )
        self._url = root if root.endswith("/v1") else f"{root}/v1"
        self._httpx = httpx
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=max_concurrent, max_keepalive_connections=max_concurrent),
        )
        self.name = name
        self._lock = threading.Lock()
        self._histories: dict[str, _History] = {}
        self._under_way: dict[Future[TurnResult], float] = {}  # when each was submitted
        self._closed = False
        try:
            self.model = model or self._first_model()
        except BaseException:
            self._client.close()
            raise

    def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
        """Send the history and the turn; see `ChatSystem`."""
        submitted_s = time.monotonic()
        if (text := turn.user_text) is None:
            return _settled(
                failed_turn(
                    "invalid_request",
                    "a server of chat completions takes text, not token ids",
                    submitted_s=submitted_s,
                    total_s=0.0,
                )
            )
        future: Future[TurnResult] = Future()
        with self._lock:
            if self._closed:
                return _settled(
                    failed_turn("cancelled", "the system is closed", submitted_s=submitted_s, total_s=0.0)
                )
            self._under_way[future] = submitted_s
        # Daemons: a read that hangs cannot be interrupted, and must not keep the program from ending.
        work = threading.Thread(
            target=lambda: self._settle(future, self._answer(turn, text, submitted_s)),
            name=f"{self.name} turn",
            daemon=True,
        )
        work.start()
        return future

    def end_conversation(self, conversation_id: str) -> None:
        """Forget the history."""
        with self._lock:
            self._histories.pop(conversation_id, None)

    def close(self) -> None:
        """Close the connections and fail what is under way."""
        with self._lock:
            self._closed = True
            under_way = list(self._under_way.items())
        for future, submitted_s in under_way:
            total_s = time.monotonic() - submitted_s
            self._settle(
                future,
                failed_turn(
                    "cancelled",
                    "closed before the server had answered",
                    submitted_s=submitted_s,
                    total_s=total_s,
                ),
            )
        self._client.close()

    def _settle(self, future: Future[TurnResult], result: TurnResult) -> None:
        """Give a turn its result, once: an answer and `close` may come together."""
        with self._lock:
            if self._under_way.pop(future, None) is None:
                return
        future.set_result(result)

    def _first_model(self) -> str:
        try:
            response = self._client.get(f"{self._url}/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (
            self._httpx.HTTPError,
            self._httpx.InvalidURL,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
        ) as error:
            raise ModelUnavailable(
                f"{self._url}/models does not name a model ({type(error).__name__}: {error}): is the server up?"
            ) from error

    def _answer(self, turn: TurnRequest, user_text: str, submitted_s: float) -> TurnResult:
        """One turn from request to the end of its stream, in a thread of its own. Does not raise."""
        with self._lock:
            history = self._histories.setdefault(turn.conversation_id, _History())
        if turn.system_text is not None and not history.messages:
            history.messages.append({"role": "system", "content": turn.system_text})
        if (
            turn.forced_answer is not None
            and history.messages
            and history.messages[-1]["role"] == "assistant"
        ):
            history.messages[-1]["content"] = turn.forced_answer
        asked = {"role": "user", "content": user_text}
        answer = StreamedAnswer()
        try:
            self._stream(turn, [*history.messages, asked], answer)
            answer.check_complete()
        except TurnFailed as failure:
            return failed_turn(
                failure.code,
                failure.message,
                submitted_s=submitted_s,
                total_s=time.monotonic() - submitted_s,
                text=answer.text,
            )
        except Exception as error:  # a server may send anything at all; the turn fails, the run goes on
            message = f"{type(error).__name__}: {error}"
            return failed_turn(
                "bad_answer",
                message,
                submitted_s=submitted_s,
                total_s=time.monotonic() - submitted_s,
                text=answer.text,
            )
        total_s = time.monotonic() - submitted_s
        history.messages += [asked, {"role": "assistant", "content": answer.text}]
        return _result(answer, history, submitted_s, total_s)

    def _stream(self, turn: TurnRequest, messages: list[dict[str, str]], answer: StreamedAnswer) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": turn.max_new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if turn.fixed_length:  # vLLM's and SGLang's words; a server without them ends where its model does
            body |= {"ignore_eos": True, "min_tokens": turn.max_new_tokens}
        try:
            with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read())
                events = EventSplitter()
                for data in response.iter_bytes():
                    for event in events.feed(data):
                        answer.take(event, time.monotonic())
                    if answer.done:
                        return
                for event in events.finish():
                    answer.take(event, time.monotonic())
        except self._httpx.TimeoutException as error:
            raise TurnFailed(
                "timeout", f"{type(error).__name__}: the server was silent for too long"
            ) from error
        except self._httpx.ConnectError as error:
            raise TurnFailed("unreachable", f"{self._url}: {error}") from error
        except (
            self._httpx.HTTPError,
            self._httpx.StreamError,
            RuntimeError,
        ) as error:  # RuntimeError: the client was closed meanwhile
            raise TurnFailed("stream_broken", f"{type(error).__name__}: {error}") from error


def _settled(result: TurnResult) -> Future[TurnResult]:
    future: Future[TurnResult] = Future()
    future.set_result(result)
    return future


def _result(answer: StreamedAnswer, history: _History, submitted_s: float, total_s: float) -> TurnResult:
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
