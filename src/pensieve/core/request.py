"""A request and what it wants sampled. Knows token ids and positions; never text, tensors or slots."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pensieve.errors import InvalidRequest

if TYPE_CHECKING:
    from pensieve.core.misses import Miss
    from pensieve.core.sequence import Sequence

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


class Verdict(enum.Enum):
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
    """One turn on its way. Written by the scheduler only."""

    request_id: str
    namespace: str
    sequence_id: str
    tokens: list[int]  # the prompt path, then what was sampled; the token log of this sequence
    history_tokens: int
    sampling: SamplingParams
    arrival: int  # order of submission
    submitted_s: float
    most_tokens: int  # prompt and answer together, as the answer's limit and the context allow
    salt: str = ""  # what the chain hashes start from: the namespace
    num_prompt: int = 0
    digests: list[bytes] = field(default_factory=list)  # chain hashes of the full chunks of `tokens`
    sequence: Sequence | None = None
    state: RequestState = RequestState.WAITING

    work: int = 0  # tokens to compute until its first, as far as is known: exact since it was last looked at while it waited
    num_overtaken: int = 0  # requests that came later and were admitted while it waited
    refusal: Verdict | None = (
        None  # why it could not be admitted when it was last looked at, the room being in the state `seen`
    )
    seen: tuple[int, int, int, int] | None = None
    due: float = 0.0  # when its missing tokens should be computed: seconds where steps are timed, else steps
    missing: list[tuple[int, int]] = field(
        default_factory=list
    )  # token ranges admitted and not scheduled yet
    num_pending: int = 0  # tokens being sampled by plans not committed yet
    in_flight: int = 0  # plans not committed yet that name this request
    started: bool = False  # the worker knows it
    ending: FinishReason | None = None  # has ended; what it holds is given back once no plan names it
    suspending: bool = False  # goes back to the queue once no plan names it
    failed: bool = False  # suspending because a forward or a swap-in failed: its plans in flight are void
    suspect: bool = False  # a forward failed with it: runs alone until one succeeds
    num_failures: int = 0
    error: str | None = None
    error_code: str = "worker_failed"

    gpu_tokens: int = 0  # the receipt's numbers, see messages.Receipt
    cpu_tokens: int = 0
    recomputed_tokens: int = 0
    new_tokens: int = 0
    misses: tuple[Miss, ...] = ()
    resume_cpu_tokens: int = 0
    resume_recomputed_tokens: int = 0
    chunks_in: int = 0
    chunks_out: int = 0
    suspensions: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.salt = self.salt or self.namespace

    @property
    def output(self) -> list[int]:
        """The tokens sampled so far."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """How many tokens were sampled so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens admitted and not scheduled yet."""
        return sum(stop - start for start, stop in self.missing)

    @property
    def is_steady(self) -> bool:
        """It decodes, nothing is in flight for it or wrong with it, and no token of its answer ends it."""
        return (
            self.plannable
            and self.first_token_s is not None
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
        """May be given spans: it runs, and nothing ends or suspends it."""
        return self.state is RequestState.RUNNING and self.ending is None and not self.suspending
