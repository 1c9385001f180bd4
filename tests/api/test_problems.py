"""Every error has its status, and nothing more than its message leaves the house."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.exceptions import HTTPException
from tests.api.fakes import CHAT, METRICS, FakeBackend, chat, client

from headrace.api import problems
from headrace.core import errors
from headrace.core.errors import HeadraceError

STATUSES = {
    "UnknownModel": 404, "InvalidRequest": 400, "ContextOverflow": 400, "Unsupported": 400,
    "Unauthorized": 401, "Forbidden": 403, "QueueFull": 429, "DoesNotFit": 503, "Loading": 503,
    "Draining": 503, "Disabled": 503, "DeadlineExceeded": 504, "QueueTimeout": 408,
    "LoadFailed": 503, "GenerationFailed": 500, "ConstraintViolated": 500,
    "OutOfMemory": 503, "WorkerDied": 502,
    "UpstreamError": 502, "ConfigError": 500,
}  # fmt: skip


def test_every_kind_is_mapped() -> None:
    """W17: no error of the tree is left to chance."""
    core = [kind for kind in errors.kinds() if kind.__module__ == errors.__name__]
    assert set(core) == set(problems.KINDS)


@pytest.mark.parametrize("name", STATUSES)
async def test_statuses(name: str) -> None:
    """W17, A: each error has its own status, in OpenAI's body."""
    error = getattr(errors, name)("Said so.", param="seed", detail="secret")
    async with client(FakeBackend(lambda _: [error])) as http:
        answer = await http.post(CHAT, json=chat())
    assert answer.status_code == STATUSES[name]
    body = answer.json()["error"]
    assert body["message"] == "Said so."
    assert body["param"] == ("model" if name == "UnknownModel" else "seed")
    assert body["type"].endswith("_error")
    assert body["code"]
    assert "secret" not in answer.text


def test_a_kind_of_somebody_else_is_as_its_base() -> None:
    """W17: a subclass that the table does not know."""
    kind: Any = type("Busy", (errors.QueueFull,), {"__module__": "elsewhere"})
    assert problems.describe(kind("Busy."), "id").status == 429


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_no_retry_after_where_nobody_knows(value: float | None) -> None:
    """M7: only a measured time is told."""
    assert problems.describe(errors.QueueFull("Full.", retry_after_s=value), "id").headers == ()


def test_retry_after_is_rounded_up() -> None:
    """M7: never a time too short."""
    problem = problems.describe(errors.Loading("No.", retry_after_s=2.0004), "id")
    assert problem.headers == ((b"retry-after", b"3"), (b"retry-after-ms", b"2001"))


async def test_unknown_exceptions_keep_their_detail_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """W17: a stable message and the id for the client, the traceback for the operator."""
    async with client(FakeBackend(lambda _: [ValueError("secret path")])) as http:
        answer = await http.post(CHAT, json=chat())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    record = next(one for one in caplog.records if one.name == "headrace.api")
    assert record.exc_info is not None
    assert vars(record)["data"]["request_id"] == answer.headers["x-request-id"]


async def test_engine_errors_are_logged_with_their_detail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """W17: the detail is for the log."""
    error = errors.WorkerDied("It died.", detail="signal 9")
    async with client(FakeBackend(lambda _: [error])) as http:
        await http.post(CHAT, json=chat())
    assert "signal 9" in caplog.text


async def test_figures_of_a_failed_request() -> None:
    """W16: also a failure tells what it cost."""
    error: HeadraceError = errors.GenerationFailed("No.", metrics=METRICS)
    async with client(FakeBackend(lambda _: [error])) as http:
        answer = await http.post(CHAT, json=chat())
    assert "total;dur=9.000" in answer.headers["server-timing"]
    assert answer.json()["metrics"]["queue_ms"] == 1.5


def test_routing_errors_of_other_kinds_keep_their_status() -> None:
    """A: the router's own statuses."""
    problem = problems.routing(HTTPException(405, headers={"Allow": "GET"}), "POST", "/x")
    assert (problem.status, problem.headers) == (405, ((b"allow", b"GET"),))
