"""Answers the proxy gives by itself, all in OpenAI's error form, and the one table from a failure to a status."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Send

from vllm_disagg.errors import DisaggError
from vllm_disagg.proxy.upstream import LegFailed

_TYPES: Final[Mapping[int, str]] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

_OF_FAILURE: Final[Mapping[str, tuple[int, str]]] = {
    "connect": (503, "the engine cannot be reached"),
    "down": (503, "the engine went down"),
    "overloaded": (503, "the engine is at its capacity"),
    "timeout": (504, "the engine did not answer in time"),
    "disconnect": (502, "the engine closed the connection"),
    "server_error": (502, "the engine answered with a server error"),
    "error_event": (502, "the engine failed while it computed the answer"),
    "bad_answer": (502, "the engine gave an answer that cannot be read"),
}
"""Cause of a failed decode leg, to the status and text that the client gets. Nothing in it tells one engine from
another."""


class ApiError(DisaggError):
    """This request ends with an HTTP error in OpenAI's form.

    Args:
        status: the HTTP status.
        message: for the client's user: what, and what would be accepted.
        param: the field at fault.
        reason: its label in the metrics.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, reason: str = "bad_request") -> None:
        self.status, self.message, self.param, self.reason = status, message, param, reason
        super().__init__(message)


def of_failure(failure: LegFailed) -> ApiError:
    """What the client gets when a decode leg failed and there is no other way."""
    status, message = _OF_FAILURE[failure.cause]
    return ApiError(status, message, reason=failure.cause)


async def send_error(send: Send, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
    """Send the answer to a request that ends with this error."""
    response = error_response(error, headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that ends with this error."""
    extra = {"Retry-After": retry_after()} if error.status in (429, 503) else {}
    if error.status in (408, 413):  # part of the body has not been read
        extra["Connection"] = "close"
    body = json.dumps(error_body(error.status, error.message, param=error.param)).encode()
    return Response(body, error.status, {**(headers or {}), **extra}, "application/json")


def error_body(status: int, message: str, *, param: str | None = None, **more: Any) -> dict[str, Any]:
    """One error in OpenAI's form."""
    kind = _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status, **more}}


def error_event(failure: LegFailed) -> bytes:
    """The end of a stream that broke after its first byte."""
    status, message = _OF_FAILURE[failure.cause]
    data = json.dumps(error_body(status, f"{message}; the answer is incomplete", retryable=True))
    return f"data: {data}\n\ndata: [DONE]\n\n".encode()


def retry_after() -> str:
    """Seconds for `Retry-After`: spread, so that refused clients do not all come back together."""
    return str(1 + secrets.randbelow(3))
