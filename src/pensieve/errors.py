"""Every error a user can meet. Knows HTTP statuses and stable codes; never where one is raised.

A message names the value that was wrong, the limit it broke and the way out. `assert` is for our own
bugs; these classes are for the world's.
"""

from __future__ import annotations


class PensieveError(Exception):
    """Base of all errors meant for a user.

    Attributes:
        code: stable, machine-readable name, the `code` of an OpenAI-style error body.
        http_status: status a server answers with.
    """

    code = "internal_error"
    http_status = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(PensieveError):
    """A setting is out of its range or contradicts another."""

    code = "invalid_config"
    http_status = 400


class InvalidRequest(PensieveError):
    """A request's own parameters are wrong (an unknown role, a negative temperature, ...)."""

    code = "invalid_request"
    http_status = 400


class ContextLengthExceeded(PensieveError):
    """A prompt is longer than the context the engine was started with."""

    code = "context_length_exceeded"
    http_status = 400


class PromptTooCostly(PensieveError):
    """Making a prompt of a request's messages took more time or memory than a request may take."""

    code = "prompt_too_costly"
    http_status = 400


class TextUnavailable(PensieveError):
    """The processes that make prompts ended, and could not be started again yet. Asking again is safe."""

    code = "text_unavailable"
    http_status = 503


class RequestTooLarge(PensieveError):
    """A request could not run even alone in the whole first tier."""

    code = "request_too_large"
    http_status = 400


class KeepRefused(PensieveError):
    """A user's keep (pin) would take more than the share of slots that keeps may hold."""

    code = "keep_refused"
    http_status = 409


class Overloaded(PensieveError):
    """The waiting queue is full."""

    code = "overloaded"
    http_status = 429


class ConversationNotFound(PensieveError):
    """No such conversation in this namespace."""

    code = "conversation_not_found"
    http_status = 404


class ModelUnavailable(PensieveError):
    """Weights (or a tokenizer) cannot be reached from here."""

    code = "model_unavailable"
    http_status = 503


class ModelRefused(PensieveError):
    """A model was found but cannot be served right: it fails the load-time gate or does not fit in memory."""

    code = "model_refused"
    http_status = 400


class StoreError(PensieveError):
    """The conversation store failed: disk full, file locked, schema newer than this program."""

    code = "store_error"
    http_status = 500


class StoreUnavailable(StoreError):
    """The conversation store fails for now: disk full, file locked or moved away, no connection."""

    http_status = 503


class AnswerLost(PensieveError):
    """This server lost its lease in the store to another server. Asking again is safe."""

    code = "answer_lost"
    http_status = 503


class ConversationConflict(PensieveError):
    """Somebody else went on with the conversation meanwhile: another process on the same store."""

    code = "conversation_conflict"
    http_status = 409


class WorkerFailed(PensieveError):
    """Computing a request failed, twice, the second time alone in its batch."""

    code = "worker_failed"
    http_status = 500


class WorkerLost(PensieveError):
    """What computes cannot go on: one of the processes that share a model ended, or they are out of step."""

    code = "worker_lost"
    http_status = 503


class EngineClosed(PensieveError):
    """The engine stopped before this request ended."""

    code = "engine_closed"
    http_status = 503


class EngineRestarted(PensieveError):
    """The engine's process died under this request, or did not come back in time. Asking again is safe."""

    code = "engine_restarted"
    http_status = 503


class EngineNotReady(PensieveError):
    """The engine is still starting: its model is being fetched or loaded."""

    code = "engine_not_ready"
    http_status = 503


class EngineSilent(PensieveError):
    """The engine did not answer in time. It is in a long step, or will be replaced."""

    code = "engine_timeout"
    http_status = 503


def error_from(code: str, message: str) -> PensieveError:
    """The error of a `code` that came as plain data (from another thread or process)."""
    for kind in PensieveError.__subclasses__():
        if vars(kind).get("code") == code:  # (its own, not the base's)
            return kind(message)
    return PensieveError(message)
