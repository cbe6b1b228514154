"""What a benchmark drives: anything that answers the turns of a chat. Knows no engine, no protocol and no
clock.

A system may be an engine in this process, one in another process, or another project's server. The driver
(`bench.compare`) sees only `ChatSystem`: a turn goes in, a future of its result comes out, and a turn that
goes wrong is a result with an error, never an exception.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from pensieve.core.receipt import Receipt
from pensieve.errors import ContextLengthExceeded

CONTEXT_FULL = ContextLengthExceeded.code  # the one error that ends a conversation in good order


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn of one conversation. Exactly one of `user_text` and `tokens` is given."""

    conversation_id: str
    turn_index: int  # 0, 1, 2, ...
    user_text: str | None  # what the user says, for a system that has a chat template
    tokens: tuple[int, ...] | None  # this turn's own new token ids, for a model of random weights
    forced_history: (
        tuple[int, ...] | None
    )  # in a replay: every token before this turn; None: the system's own history
    max_new_tokens: int
    fixed_length: bool  # answer with exactly max_new_tokens, whatever the model thinks of stopping
    system_text: str | None = None  # the conversation's system prompt; turn 0 only, and only with `user_text`
    forced_answer: str | None = None  # in a replay: the text that was answered to the turn before this one
    # in a replay: every token of the prompt, history and this turn's; None: not known
    forced_prompt: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert (self.user_text is None) != (self.tokens is None), (
            "a turn is text or tokens, not both and not neither"
        )


@dataclass(frozen=True, slots=True)
class TurnResult:
    """What came of one turn. A failed one has `error_code` and `error`, and what was known until then."""

    prompt_path: tuple[
        int, ...
    ]  # all tokens the model was given, history included; () = the system does not tell
    output: tuple[int, ...]  # the answer's token ids; () = none, or the system does not tell
    text: str
    tops: tuple[
        tuple[tuple[int, float], ...], ...
    ]  # per output token the likeliest (id, logprob), likeliest first; () = not told
    logprobs: tuple[float, ...]  # per output token, natural log; () = not told
    submitted_s: float  # the system's own clock, seconds
    queue_s: float | None  # from submission to the start of work; None = not told
    first_token_s: float | None  # from submission to the first token; None = there was none
    total_s: float  # from submission to the end
    receipt: Receipt | None  # where the prompt's tokens came from; None = not told
    finish_reason: str | None  # "stop", "length", ...; None = the turn failed
    error_code: str | None = None  # a PensieveError.code, or the server's own
    error: str | None = None  # for people
    reported_output_tokens: int | None = None  # of a system that counts tokens but does not name them

    @property
    def ok(self) -> bool:
        """The turn was answered."""
        return self.error_code is None

    @property
    def num_output(self) -> int:
        """Tokens of the answer, as far as known."""
        return len(self.output) or self.reported_output_tokens or 0


def failed_turn(code: str, message: str, *, submitted_s: float, total_s: float, text: str = "") -> TurnResult:
    """The result of a turn that went wrong before anything but perhaps some text was known."""
    return TurnResult(
        (), (), text, (), (), submitted_s, None, None, total_s, None, None, error_code=code, error=message
    )


class ChatSystem(Protocol):
    """Answers the turns of many conversations at once. Called from one thread; futures may settle on any."""

    @property
    def name(self) -> str:
        """Short, for tables and legends."""
        ...

    def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
        """Take one turn and return at once. Turns of one conversation come one after the other.

        The future ends with a result, also when the turn failed (`TurnResult.error_code`).
        """
        ...

    def end_conversation(self, conversation_id: str) -> None:
        """No more turns will come: what is kept for it may go. An unknown id is no error."""
        ...

    def close(self) -> None:
        """Stop; turns under way end with an error result. A second call does nothing."""
        ...
