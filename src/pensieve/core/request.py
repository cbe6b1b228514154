"""A request and what it wants sampled. Knows token ids and positions; never text, tensors or slots."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from pensieve.core.receipt import Receipt
from pensieve.core.sequence import Key, Sequence
from pensieve.errors import InvalidRequest

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one request is chosen. Defaults are greedy."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # before so many the answer does not end by a stop token or a stop string
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in CTRL (arXiv:1909.05858)
    presence_penalty: float = 0.0  # over the output, as OpenAI defines it
    frequency_penalty: float = 0.0  # over the output, as OpenAI defines it
    seed: int | None = None  # None = drawn by the worker
    stop_token_ids: frozenset[int] = frozenset()  # a sampled one ends the answer and stays in the token log
    logprobs: int | None = None  # None = none; k = the sampled token's and the k likeliest

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, limit: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {limit}, got {getattr(self, name)}")

        check(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"in [0, max_new_tokens = {self.max_new_tokens}]",
        )
        check(
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0, "temperature", "in [0, 100]"
        )
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(self.top_k >= 0, "top_k", "0 (all) or positive")
        check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        check(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0,
            "repetition_penalty",
            "positive",
        )
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"in [0, {MAX_LOGPROBS}]"
        )


class RequestState(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"  # in the queue, holds no lease
    RUNNING = "running"  # every chunk it needs is leased
    SUSPENDED = "suspended"  # ran, lost its room, is back in the queue in arrival order
    FINISHED = "finished"


class Readiness(enum.Enum):
    """Whether a waiting request can be admitted."""

    NOW = "now"
    AFTER_COPIES = "after copies"  # once copies under way have settled
    MAKING_ROOM = "making room"  # it will be, but copies under way are not enough
    NOT_YET = "not yet"  # what runs holds the room, or computes what it needs


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"  # a stop token, or the caller found a stop string
    LENGTH = "length"  # max_new_tokens, the context, or the memory of the last running request
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One turn in the scheduler, which alone writes it."""

    request_id: str
    namespace: str
    sequence_id: str
    tokens: list[int]  # the prompt path, then the sampled tokens
    history_tokens: int  # of the prompt, tokens that an earlier turn had put before the model
    sampling: SamplingParams
    arrival: int  # order of submission
    submitted_s: float
    most_tokens: int  # prompt and answer together, as the answer's limit and the context allow
    salt: str  # the chain hashes start from it: the namespace, or one of its own where nothing is shared
    digests: list[bytes]  # chain hashes of the full chunks of `tokens`
    num_prompt: int = field(init=False)
    receipt: Receipt = field(init=False)
    sequence: Sequence | None = None  # None until its turn comes in its conversation
    state: RequestState = RequestState.WAITING

    # while it waits
    work: int = 0  # tokens to compute until its first token; exact since the cache was last looked at
    num_overtaken: int = 0  # later requests that were admitted while it waited
    refusal: Readiness | None = None  # why it was not admitted while the room was as in `seen`
    seen: tuple[int, int, int, int] | None = None

    # while it runs
    due: float = 0.0  # when its missing tokens should be computed: seconds where steps are timed, else steps
    missing: list[tuple[int, int]] = field(default_factory=list)  # token ranges to compute, not scheduled yet
    num_pending: int = 0  # tokens being sampled by plans not committed yet
    in_flight: int = 0  # plans not committed yet that name this request
    started: bool = False  # it was admitted once, and the worker knows it
    chunks_in: int = 0  # swapped in for it, also after suspensions
    chunks_out: int = 0  # of its conversation, swapped out since the previous receipt

    # how it ends
    ending: FinishReason | None = None  # set once it ends; its leases last until no plan names it
    suspending: bool = False  # goes back to the queue once no plan names it
    failed: bool = False  # suspending because a forward or a swap-in failed: its plans in flight are void
    suspect: bool = False  # a forward failed with it: it runs alone until one succeeds
    num_failures: int = 0  # in a row
    error: str | None = None
    error_code: str = "worker_failed"

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.receipt = Receipt(self.num_prompt)

    @property
    def key(self) -> Key:
        """Of its sequence."""
        return self.namespace, self.sequence_id

    @property
    def next_length(self) -> int | None:
        """Tokens including its next decode and those on their way; None if it is not to decode."""
        if self.missing:
            return None
        length = len(self.tokens) + self.num_pending
        return length if length < self.most_tokens and self.plannable else None

    @property
    def output(self) -> list[int]:
        """The sampled tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens admitted and not scheduled yet."""
        return sum(stop - start for start, stop in self.missing)

    @property
    def is_steady(self) -> bool:
        """It decodes, no plan in flight names it, nothing failed, and no token of its answer ends it."""
        return (
            self.plannable
            and self.receipt.first_token_s is not None
            and not (
                self.missing
                or self.in_flight
                or self.suspect
                or self.num_failures
                or self.sampling.stop_token_ids
            )
        )

    @property
    def plannable(self) -> bool:
        """May be given spans: it runs, and is neither ending nor being suspended."""
        return self.state is RequestState.RUNNING and self.ending is None and not self.suspending
