"""Errors as OpenAI's clients expect them. Knows statuses and bodies; never what went wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from pensieve.errors import PensieveError
from pensieve.server.redaction import redacted

log = logging.getLogger(__name__)

# first parts of the paths that a client with a base URL without /v1 asks for
API = ("chat", "completions", "conversations", "models", "responses")
UNKNOWN_FIELD = "unknown_field"  # pydantic's type of the error that `Strict` raises
MAX_MESSAGE, MAX_PARAM = 2000, 200  # characters of an error: a client's input is not sent back whole
RETRY_AFTER_S = 2  # the Retry-After of errors that have none of their own


class ApiError(PensieveError):
    """A request that the server refuses by itself."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.api_code = code
        self.param = param
        self.headers = dict(headers or {})


def unsupported(param: str, message: str) -> ApiError:
    """A field of the API that this server does not support: refused, never ignored."""
    return ApiError(400, message, code="unsupported_parameter", param=param)


def not_found(what: str, param: str | None = None, code: str = "not_found") -> ApiError:
    """A thing does not exist, or belongs to another tenant."""
    return ApiError(404, what, code=code, param=param)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ApiError):
        return error.status
    return error.http_status if isinstance(error, PensieveError) else 500


def error_body(error: BaseException) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    status = status_of(error)
    if isinstance(error, ApiError):
        message, code, param = error.message, error.api_code, error.param
    elif isinstance(error, PensieveError):
        message, code, param = error.message, error.code, None
    else:
        message, code, param = (
            "the server failed on an error of its own; it is in its log",
            "internal_error",
            None,
        )
    message, param = _shortened(message, MAX_MESSAGE), None if param is None else _shortened(param, MAX_PARAM)
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def error_headers(error: BaseException) -> dict[str, str]:
    """Headers that belong to an error."""
    headers = dict(error.headers) if isinstance(error, ApiError) else {}
    if status_of(error) in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return headers


def error_response(error: BaseException) -> JSONResponse:
    """The whole HTTP response."""
    return JSONResponse(error_body(error), status_of(error), error_headers(error))


def install(app: FastAPI) -> None:
    """Give every failure of a route this form."""

    @app.exception_handler(PensieveError)
    async def ours(request: Request, error: PensieveError) -> JSONResponse:
        if status_of(error) == 500:
            log.error(
                "%s %s failed: %s", request.method, redacted(quote(request.url.path)), redacted(error.message)
            )
        # Their frames hold the request's body, for as long as the error is remembered.
        error.__traceback__ = error.__context__ = None
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(from_validation(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        hint = f": OpenAI's API is below /v1, as in /v1{path}" if path.split("/")[1] in API else ""
        known = {
            404: f"there is nothing at {request.method} {path}{hint}",
            405: f"{path} does not take {request.method}",
        }
        message = known.get(error.status_code, str(error.detail))
        return error_response(
            ApiError(error.status_code, message, code=_code_of(error.status_code), headers=error.headers)
        )


def from_validation(error: RequestValidationError) -> ApiError:
    """The first fault of a body, in one sentence."""
    first = error.errors()[0]
    path = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    if first.get("type") == UNKNOWN_FIELD:
        path.append(str(first.get("ctx", {}).get("name", "")))
    where = _shortened(".".join(path), MAX_PARAM) or None
    if first.get("type") == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    if first.get("type") in ("extra_forbidden", UNKNOWN_FIELD):
        return ApiError(
            400,
            f"unknown parameter {where!r}: this server does not know it",
            code="unknown_parameter",
            param=where,
        )
    if first.get("type") == "model_attributes_type" and where is None:
        return ApiError(
            400,
            "the body must be a JSON object, sent with the header Content-Type: application/json",
            code="invalid_json",
        )
    if first.get("type") == "missing":
        return ApiError(
            400, f"{where or 'the body'} is required", code="missing_required_parameter", param=where
        )
    if first.get("type") == "too_long" and where == "messages":
        limit = first.get("ctx", {}).get("max_length")
        return ApiError(
            400,
            f"messages has more than {limit} entries: send less at a time",
            code="too_many_messages",
            param=where,
        )
    message = str(first.get("msg", "is not valid")).removeprefix("Value error, ")
    return ApiError(400, f"{where}: {message}" if where else message, code="invalid_value", param=where)


def _shortened(text: str, limit: int) -> str:
    """The beginning and the end of a text that is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 4) :]}"


def _type_of(status: int) -> str:
    return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )


def _code_of(status: int) -> str:
    try:
        return HTTPStatus(status).phrase.lower().replace(" ", "_")
    except ValueError:
        return "error"
