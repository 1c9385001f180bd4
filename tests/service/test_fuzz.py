"""Whatever is sent to the whole service, it answers and lives (issue: must show 7)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from tests.operations import check, described, each, takes_something
from tests.service.serving import Service, served

from headrace.api.app import ADMIN_ROUTES, ROUTES
from headrace.api.exchange import Route

relaxed = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served("builtin:echo", "--context-length", "4096") as running:
        yield running


ALLOWED = described(ROUTES)


@each(ROUTES)
def test_requests_made_from_the_document(route: Route, service: Service) -> None:
    """A: no 500 and no hang, down to the engine in its process."""

    def test(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = "echo"
        answer = case.call(base_url=service.url, timeout=60)
        case.validate_response(answer, checks=[not_a_server_error])

    check(ALLOWED, route, settings(relaxed, max_examples=6), test)


# Of each task, so that no request ends at the first check.
MODELS = """
[models.echo]
model = "echo"
options = { images = true }
context_length = 4096
[models.vectors]
model = "echo"
task = "embed"
[models.ranks]
model = "echo"
task = "rerank"
"""
BY_TASK = {"embed": "vectors", "rank": "ranks", "relevance": "ranks", "score": "ranks"}
EVERY = (*ROUTES, *ADMIN_ROUTES)
ANY = described(EVERY)
ANY.config.generation.update(modes=list(GenerationMode))


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "headrace.toml").write_text(MODELS)
    variables = {"CONFIG": str(folder / "headrace.toml"), "HOME": str(folder / "home")}
    with pytest.MonkeyPatch.context() as patch:
        # A name that is to be loaded would be looked for at the hub.
        patch.setenv("HF_HUB_OFFLINE", "1")
        with served(environment=variables) as running:
            yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@each(EVERY)
def test_any_request_to_any_route(route: Route, mode: GenerationMode, services: Service) -> None:
    """Issue 14.4: no 5xx on any route, also for what the document does not allow."""
    if mode is GenerationMode.NEGATIVE and not takes_something(ANY, route):
        pytest.skip("A request without parameters and body cannot be wrong.")

    def test(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            names = [name for part, name in BY_TASK.items() if part in case.operation.path]
            case.body["model"] = (names or ["echo"])[0]
        answer = case.call(base_url=services.url, timeout=60)
        case.validate_response(answer, checks=[not_a_server_error])

    check(ANY, route, settings(relaxed, max_examples=60), test, mode)


@given(text=st.text(min_size=1, max_size=60), per_delta=st.integers(1, 5))
@relaxed
def test_streamed_text_is_the_whole_text(service: Service, text: str, per_delta: int) -> None:
    """W13: a stream's pieces are the whole text, wherever the characters are cut."""
    body = {"model": "echo", "prompt": text, "max_tokens": 1000, "n": per_delta}
    whole = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()
    got = [""] * per_delta
    with httpx.stream(
        "POST", f"{service.url}/v1/completions", json=body | {"stream": True}, timeout=20
    ) as stream:
        # Lines of events end with a line feed; iter_lines would also cut at U+0085 or U+2028.
        for line in stream.read().split(b"\n"):
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    got[choice["index"]] += choice["text"]
    assert got == [choice["text"] for choice in whole["choices"]] == [text] * per_delta


def test_it_still_lives(service: Service) -> None:
    answer = httpx.get(f"{service.url}/health", timeout=5)
    assert answer.status_code == 200
    assert "Traceback" not in service.log
