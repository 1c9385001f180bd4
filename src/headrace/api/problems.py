"""Errors as HTTP responses: the status, type and code of each."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace
from starlette.exceptions import HTTPException

from headrace.core import errors
from headrace.core.errors import HeadraceError
from headrace.core.metrics import InferenceMetrics
from headrace.core.sampling import SamplingFields

Headers = tuple[tuple[bytes, bytes], ...]

_log = logging.getLogger("headrace.api")
_INVALID, _LIMIT, _SERVER = "invalid_request_error", "rate_limit_error", "server_error"

_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_DBGPT_CODES = {
    "model_not_found": 40301,
    "context_length_exceeded": 40303,
    "out_of_memory": 50002,
    "invalid_api_key": 40102,
    "insufficient_permissions": 40103,
}
_DBGPT_STATUSES = {408: 42903, 429: 42901, 503: 42903, 504: 42903}
_DBGPT_RANGES = frozenset({"max_new_tokens", *SamplingFields.__struct_fields__})
_SIZES = re.compile(r"(\d+) tokens and the context length is (\d+)")

KINDS: dict[type[HeadraceError], tuple[int, str, str | None]] = {
    errors.HeadraceError: (500, _SERVER, "internal_error"),
    errors.RequestError: (400, _INVALID, None),
    errors.UnknownModel: (404, _INVALID, "model_not_found"),
    errors.UnknownRequest: (404, _INVALID, "request_not_found"),
    errors.UnknownKey: (404, _INVALID, "key_not_found"),
    errors.InvalidRequest: (400, _INVALID, "invalid_value"),
    errors.ContextOverflow: (400, _INVALID, "context_length_exceeded"),
    errors.Unsupported: (400, _INVALID, "unsupported_parameter"),
    errors.Quarantined: (400, _INVALID, "request_quarantined"),
    errors.Unauthorized: (401, _INVALID, "invalid_api_key"),
    errors.Forbidden: (403, _INVALID, "insufficient_permissions"),
    errors.CapacityError: (503, _SERVER, "overloaded"),
    errors.QueueFull: (429, _LIMIT, "queue_full"),
    errors.RateLimited: (429, _LIMIT, "rate_limit_exceeded"),
    errors.DatabaseDown: (503, _SERVER, "database_down"),
    errors.DoesNotFit: (503, _SERVER, "model_does_not_fit"),
    errors.Loading: (503, _SERVER, "model_loading"),
    errors.Draining: (503, _SERVER, "draining"),
    errors.Disabled: (503, _SERVER, "model_disabled"),
    errors.NoNode: (503, _SERVER, "no_node"),
    errors.DeadlineExceeded: (504, _SERVER, "deadline_exceeded"),
    errors.QueueTimeout: (408, _LIMIT, "queue_timeout"),
    errors.EngineError: (500, _SERVER, "engine_error"),
    errors.LoadFailed: (503, _SERVER, "model_load_failed"),
    errors.GenerationFailed: (500, _SERVER, "generation_failed"),
    errors.ConstraintViolated: (500, _SERVER, "constraint_violated"),
    errors.NotStarted: (503, _SERVER, "not_started"),
    errors.OutOfMemory: (503, _SERVER, "out_of_memory"),
    errors.WorkerDied: (502, _SERVER, "worker_died"),
    errors.NodeGone: (502, _SERVER, "node_gone"),
    errors.UpstreamError: (502, _SERVER, "upstream_error"),
    errors.ConfigError: (500, _SERVER, "misconfigured"),
}
"""Status, OpenAI's type and code of each kind; a kind not listed is as its base."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's `error`; `param` is the field to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """OpenAI's error body; `metrics` are the figures of a stream that failed."""

    error: ErrorDetail
    metrics: InferenceMetrics | None = None


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it is sent to the client."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Headers = ()
    metrics: InferenceMetrics | None = None

    def body(self) -> bytes:
        """Return OpenAI's error body."""
        detail = ErrorDetail(self.message, self.type, self.param, self.code)
        return msgspec.json.encode(ErrorBody(detail, self.metrics))


class AnthropicDetail(msgspec.Struct, frozen=True):
    """Anthropic's `error`."""

    type: str
    message: str


class AnthropicError(
    msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="error"
):
    """Anthropic's error body; `metrics` are the figures of a stream that failed."""

    error: AnthropicDetail
    request_id: str
    metrics: InferenceMetrics | None = None


class OllamaError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ollama's error body; `metrics` are the figures of a stream that failed."""

    error: str
    metrics: InferenceMetrics | None = None


class DbgptText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of an output, as DB-GPT has it."""

    data: str
    format: str = "text"


class DbgptContent(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an output: the answer (`text`) or what was thought before it (`thinking`)."""

    object: DbgptText
    type: Literal["text", "thinking"] = "text"


class DbgptError(msgspec.Struct, frozen=True, kw_only=True):
    """DB-GPT's output of a request that failed; `detail` is where its other routes have it."""

    content: DbgptContent
    error_code: int
    detail: str


class Dialect(NamedTuple):
    """The errors of the routes of an API; `id_header` repeats the id of the request."""

    error: type[msgspec.Struct]
    write: Callable[[Problem, str], bytes]
    id_header: bytes = b""


class Refused(Exception):
    """A request that is refused before it is decoded: too large, of the wrong type, too slow."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refused(status: int, message: str, code: str, headers: Headers = ()) -> Refused:
    """Return the exception for a request that is refused before it is decoded."""
    return Refused(Problem(status=status, message=message, code=code, headers=headers))


def describe(error: BaseException, request_id: str) -> Problem:
    """Return any exception as a problem; the details of unknown ones are only logged."""
    if isinstance(error, Refused):
        return error.problem
    if isinstance(error, HeadraceError):
        return _known(error)
    return Problem(
        status=500,
        message=f"The server failed. Its log has the reason under request {request_id}.",
        type=_SERVER,
        code="internal_error",
    )


def dialect_of(path: str) -> Dialect:
    """Return how errors are written for a path, also for one that is not served."""
    if path.startswith("/api/worker/"):
        return DBGPT_FRAMES if path.endswith("/generate_stream") else DBGPT
    if path.startswith("/api/"):
        return OLLAMA
    return ANTHROPIC if f"{path}/".startswith("/v1/messages/") else OPENAI


def renamed(problem: Problem, names: Mapping[str, str]) -> Problem:
    """Return a problem with the client's names for fields of the core."""
    if (param := problem.param) is None or param not in names:
        return problem
    message = re.sub(rf"\b{param}\b", names[param], problem.message)
    return replace(problem, param=names[param], message=message)


def _openai_body(problem: Problem, _request_id: str) -> bytes:
    return problem.body()


def _anthropic_body(problem: Problem, request_id: str) -> bytes:
    message, param = problem.message, problem.param
    if problem.code == "context_length_exceeded":
        # Clients look for this text, and then shorten the conversation.
        sizes = _SIZES.search(message)
        reason = f"{sizes[1]} tokens > {sizes[2]} maximum" if sizes else message
        message = f"prompt is too long: {reason}"
    elif param and param not in message:
        message = f"{param}: {message}"
    kind = _ANTHROPIC_KINDS.get(problem.status) or (_INVALID, "api_error")[problem.status >= 500]
    body = AnthropicError(AnthropicDetail(kind, message), request_id, problem.metrics)
    return msgspec.json.encode(body)


def _ollama_body(problem: Problem, _request_id: str) -> bytes:
    # Clients look for `not found`, and then pull the model.
    missing = problem.code == "model_not_found"
    message = f"model not found: {problem.message}" if missing else problem.message
    return msgspec.json.encode(OllamaError(message, problem.metrics))


def _dbgpt_body(problem: Problem, _request_id: str) -> bytes:
    content = DbgptContent(object=DbgptText(data=problem.message))
    code = _dbgpt_code(problem)
    return msgspec.json.encode(DbgptError(content=content, error_code=code, detail=problem.message))


def _dbgpt_frame(problem: Problem, request_id: str) -> bytes:
    # A client of frames does not read the status.
    return _dbgpt_body(problem, request_id) + b"\0"


def _dbgpt_code(problem: Problem) -> int:
    """Return the number that DB-GPT's API server hands on."""
    if problem.code in _DBGPT_CODES:
        return _DBGPT_CODES[problem.code]
    if problem.status in _DBGPT_STATUSES:
        return _DBGPT_STATUSES[problem.status]
    if problem.status >= 500:
        return 50001
    return 40302 if problem.param in _DBGPT_RANGES else 40001


OPENAI = Dialect(ErrorBody, _openai_body)
DBGPT = Dialect(DbgptError, _dbgpt_body)
DBGPT_FRAMES = Dialect(DbgptError, _dbgpt_frame)
OLLAMA = Dialect(OllamaError, _ollama_body)
ANTHROPIC = Dialect(AnthropicError, _anthropic_body, b"request-id")


def _known(error: HeadraceError) -> Problem:
    kind = next(base for base in type(error).__mro__ if base in KINDS)
    status, family, code = KINDS[kind]
    param = "model" if isinstance(error, errors.UnknownModel) else error.param
    return Problem(
        status=status,
        message=error.message,
        type=family,
        param=param,
        code=code,
        headers=_headers(error),
        metrics=error.metrics,
    )


def _headers(error: HeadraceError) -> Headers:
    if isinstance(error, errors.Unauthorized):
        return ((b"www-authenticate", b'Bearer realm="headrace"'),)
    if error.retry_after_s is None or not math.isfinite(error.retry_after_s):
        return ()
    wait = max(error.retry_after_s, 0.0)
    return (
        (b"retry-after", b"%d" % math.ceil(wait)),
        (b"retry-after-ms", b"%d" % math.ceil(wait * 1000)),
    )


def routing(error: HTTPException, method: str, path: str) -> Problem:
    """Return a 404 or 405 of the router in OpenAI's format."""
    headers = tuple((k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items())
    if error.status_code == 405:
        message, code = f"Not allowed to {method} on {path}.", "method_not_supported"
    else:
        message, code = f"Invalid URL ({method} {path})", "unknown_url"
    return Problem(status=error.status_code, message=message, code=code, headers=headers)


def log(error: BaseException, request_id: str) -> None:
    """Log the details that the client does not receive."""
    if isinstance(error, Refused | errors.RequestError | errors.CapacityError):
        return
    if isinstance(error, HeadraceError):
        _log.error(
            "%s: %s %s",
            type(error).__name__,
            error.message,
            error.detail or "",
            extra={"data": {"request_id": request_id}},
        )
    else:
        _log.error(
            "request %s failed",
            request_id,
            exc_info=error,
            extra={"data": {"request_id": request_id}},
        )
