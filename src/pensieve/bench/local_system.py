"""Our own engine, in this process, as a system to measure. Knows the conversation service; never a scheduler
or a model.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future

from pensieve.bench.systems import TurnRequest, TurnResult, failed_turn
from pensieve.core.request import SamplingParams
from pensieve.errors import PensieveError
from pensieve.message import Message
from pensieve.service import ConversationService, PendingTurn, TurnDone

NUM_TOPS = 2  # the two likeliest tokens of each position: what the equality contract compares


class LocalSystem:
    """A `ChatSystem` over a `ConversationService`. The service is the caller's to close."""

    def __init__(self, name: str, service: ConversationService) -> None:
        self._name = name
        self._service = service
        self._logs: dict[str, tuple[int, ...]] = {}  # token paths of conversations without text

    @property
    def name(self) -> str:
        """See `ChatSystem`."""
        return self._name

    def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
        """See `ChatSystem`. Greedy, so that two systems can be compared."""
        sampling = SamplingParams(max_new_tokens=turn.max_new_tokens, logprobs=NUM_TOPS)
        begun_s = time.perf_counter()
        pending = (
            self._send_text(turn, sampling)
            if turn.tokens is None
            else self._send_tokens(turn, turn.tokens, sampling)
        )
        answer: Future[TurnResult] = Future()
        pending.future.add_done_callback(lambda done: answer.set_result(self._result(turn, done, begun_s)))
        return answer

    def end_conversation(self, conversation_id: str) -> None:
        """See `ChatSystem`."""
        self._logs.pop(conversation_id, None)
        self._service.engine.forget(conversation_id)

    def close(self) -> None:
        """Nothing of its own to close."""

    def _send_text(self, turn: TurnRequest, sampling: SamplingParams) -> PendingTurn:
        assert turn.user_text is not None
        new = [Message("user", turn.user_text)]
        if turn.system_text is not None:
            new.insert(0, Message("system", turn.system_text))
        replay = None
        if turn.forced_prompt is not None:
            # its history is what both prompts begin with; a prompt that was shortened on the way begins
            # differently
            pairs = zip(turn.forced_prompt, turn.forced_history or (), strict=False)
            replay = (
                turn.forced_prompt,
                sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
            )
        return self._service.send(
            turn.conversation_id, new, sampling, ignore_eos=turn.fixed_length, replay=replay
        )

    def _send_tokens(
        self, turn: TurnRequest, tokens: tuple[int, ...], sampling: SamplingParams
    ) -> PendingTurn:
        history = (
            turn.forced_history
            if turn.forced_history is not None
            else self._logs.get(turn.conversation_id, ())
        )
        # (drawn tokens are never shortened, so history and new tokens are the prompt that was replayed)
        return self._service.complete(turn.conversation_id, (*history, *tokens), len(history), sampling)

    def _result(self, turn: TurnRequest, pending: Future[TurnDone], begun_s: float) -> TurnResult:
        total_s = time.perf_counter() - begun_s
        error = pending.exception()
        if error is not None:
            code = error.code if isinstance(error, PensieveError) else PensieveError.code
            return failed_turn(code, str(error), submitted_s=begun_s, total_s=total_s)
        done = pending.result()
        if turn.tokens is not None:
            self._logs[turn.conversation_id] = done.prompt + done.output
        receipt = done.receipt
        return TurnResult(
            prompt_path=done.prompt,
            output=done.output,
            text=done.text,
            tops=done.tops,
            logprobs=done.logprobs,
            submitted_s=begun_s,
            queue_s=receipt.queue_s,
            first_token_s=receipt.first_token_s,
            total_s=total_s,
            receipt=receipt,
            finish_reason=done.reason.value,
        )
