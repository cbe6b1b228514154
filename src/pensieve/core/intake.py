"""Which prompts are refused, and how an error says the way out.

Knows limits and token ids; never queues or chunks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

from pensieve.config import ContextLimit
from pensieve.errors import ContextLengthExceeded, InvalidRequest, RequestTooLarge

MAX_TOKEN_ID = (1 << 32) - 1  # the largest that a chain hash and the store can hold


class PromptLimits:
    """What a prompt must be like to be queued."""

    def __init__(self, max_context: int, vocab_size: int, limit: ContextLimit | None) -> None:
        """`limit` says what would allow a longer sequence; None if that is unknown."""
        self.max_context, self.vocab_size = max_context, vocab_size
        self._limit = limit

    def check(self, tokens: Tokens[int], namespace: str, history_tokens: int, max_new_tokens: int) -> None:
        """Refuse a prompt that no engine of this model and context could take.

        Raises:
            InvalidRequest: no tokens, an id outside the vocabulary, or a negative or too long history.
            ContextLengthExceeded: the prompt leaves no room for one new token within `max_context`.
        """
        if not tokens:
            raise InvalidRequest("a prompt needs at least one token, got none")
        if (wrong := _first_wrong_id(tokens, self.vocab_size)) is not None:
            raise InvalidRequest(
                f"token ids must be integers in [0, {self.vocab_size}) (the vocabulary), "
                f"got {tokens[wrong]!r}"
            )
        try:
            namespace.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the namespace {namespace!r} is not valid text: {error}") from error
        if not 0 <= history_tokens <= len(tokens):
            raise InvalidRequest(
                f"history_tokens must lie in [0, {len(tokens)}] (the prompt's length), got {history_tokens}"
            )
        if len(tokens) >= self.max_context:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens)} tokens, but at most {self.max_context - 1} fit in the context "
                f"of {self.max_context}: shorten it, start a new conversation, allow the oldest turns to be "
                f"dropped (--overflow truncate){self._way_out(len(tokens), max_new_tokens)}"
            )

    def check_chunks(
        self, num_prompt: int, max_new_tokens: int, chunk_tokens: int, capacity: int, num_slots: int
    ) -> None:
        """Refuse a prompt that could not run alone in the `capacity` slots (of `num_slots`) that it can have.

        Raises:
            RequestTooLarge: its chunks would not fit.
        """
        if (need := -(-num_prompt // chunk_tokens)) > capacity:
            raise RequestTooLarge(
                f"the prompt has {num_prompt} tokens and needs {need} chunks of {chunk_tokens}, "
                f"but the first tier has {capacity} for one request: shorten it"
                f"{self._way_out(num_prompt, max_new_tokens, others=num_slots - capacity)}"
            )

    def _way_out(self, num_prompt: int, num_new: int, *, others: int = 0) -> str:
        """The end of an error message: how to start an engine that has room for the prompt and its answer.

        Of the answer only as many tokens count as the model can take; `others` slots are kept for good.
        """
        if self._limit is None:
            return ", or start with a larger first tier"
        num_tokens = max(num_prompt + 1, min(num_prompt + num_new, self._limit.model_tokens))
        return f", or {self._limit.way_out(num_tokens, others=others)}"


def _first_wrong_id(tokens: Tokens[int], vocab_size: int) -> int | None:
    """Position of the first id that is not an integer in [0, vocab_size); None if there is none."""
    try:
        array("I", tokens)  # one C loop over a long prompt; refuses ids above MAX_TOKEN_ID
        if vocab_size > MAX_TOKEN_ID or max(tokens) < vocab_size:
            return None
    except (TypeError, OverflowError):
        pass
    return next(
        (at for at, token in enumerate(tokens) if not (isinstance(token, int) and 0 <= token < vocab_size)),
        None,
    )
