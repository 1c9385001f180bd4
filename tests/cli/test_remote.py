"""`headrace run` with a service that is running."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from tests.cli.programs import headrace, serving
from tests.cli.stub import stub

from headrace.cli import remote
from headrace.cli.client import Client
from headrace.config import load
from headrace.core.errors import ConfigError


@pytest.fixture
def service(environ: dict[str, str]) -> Iterator[str]:
    with serving(environ, "echo", "-o", "text=from the service") as (_, url):
        yield url


def test_run_uses_a_service_that_has_the_model(environ: dict[str, str], service: str) -> None:
    """Issue 12.27: no second copy of the model; --local, --url and options of a load decide."""
    here = {**environ, "HEADRACE_PORT": service.rpartition(":")[2]}
    remote = ("from the service\n", f", from {service}")
    local = ("hi\n", "")
    for variables, arguments, (text, place) in (
        (here, ("echo", "hi"), remote),
        (here, ("builtin:echo", "hi"), remote),
        (here, ("echo", "hi", "--local"), local),
        (here, ("echo", "hi", "-o", "slots=2"), local),
        (environ, ("echo", "hi", "--url", f"{service}/v1"), remote),
        ({**environ, "HEADRACE_URL": service}, ("echo", "hi"), remote),
    ):
        done = headrace(variables, "run", *arguments)
        assert (done.returncode, done.stdout) == (0, text), (arguments, done.stderr)
        assert done.stderr.splitlines()[-1].endswith(place or "stop"), arguments
    # Of the only model without its name, and the parameters arrive.
    done = headrace(environ, "run", "--url", service, "--max-tokens", "4", "--json", stdin="hi")
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["text"], answer["finish_reason"]) == ("echo", "from", "length")
    refused = headrace(environ, "run", "ecko", "hi", "--url", service)
    assert (refused.returncode, "'ecko' is not served" in refused.stderr) == (1, True)


def test_a_service_that_has_not_the_model_or_is_none(
    environ: dict[str, str], free_port: Callable[[], int]
) -> None:
    """Issue 12.27: then the model is loaded here, unless the address was given."""
    with stub({"/admin/models": (404, b"no"), "/v1/models": (200, b"<html>")}) as other:
        done = headrace({**environ, "HEADRACE_PORT": other.url[17:]}, "run", "echo", "hi")
        assert (done.returncode, done.stdout) == (0, "hi\n")
    models = {"data": [{"id": "another"}]}
    with stub({"/admin/models": (403, b"no"), "/v1/models": (200, models)}) as other:
        done = headrace({**environ, "HEADRACE_PORT": other.url[17:]}, "run", "echo", "hi")
        assert (done.returncode, done.stdout) == (0, "hi\n")
    nowhere = f"http://127.0.0.1:{free_port()}"
    for variables, more in (
        (environ, ("--url", nowhere)),
        ({**environ, "HEADRACE_URL": nowhere}, ()),
    ):
        done = headrace(variables, "run", "echo", "hi", *more)
        assert (done.returncode, "No service at" in done.stderr + done.stdout) in (
            (1, True),
            (1, False),
        )


@pytest.mark.usefixtures("as_environ")
def test_a_server_of_another_program_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12.27: any server with OpenAI's API; its only model has not to be named."""
    monkeypatch.setenv("HEADRACE_API_KEY", "k")
    with stub({"/admin/models": (404, b"no"), "/v1/models": (200, {"data": [{"id": "m"}]})}) as it:
        spec = remote.served(load(), None, it.url)
        assert spec is not None
        assert (spec.name, spec.model) == ("m", "headrace:m")
        assert spec.options["base_url"] == f"{it.url}/v1"
        assert spec.options["api_key"] == "k"
        it.answers["/v1/models"] = (200, {"data": [{"id": "m"}, {"id": "n"}]})
        with pytest.raises(ConfigError, match=r"Name a model of the service at .*: m, n\."):
            remote.served(load(), None, it.url)


@pytest.mark.usefixtures("as_environ")
def test_a_reference_of_several_models_names_none_of_them() -> None:
    """Issue 12.27: `run echo` is not answered by another model made of echo, as a reranker."""
    models = [{"id": id, "source": "builtin:echo", "state": "ready"} for id in ("a", "b")]
    status = {"models": models, "devices": []}
    with stub({"/admin/models": (200, status)}) as it:
        assert (
            remote.served(load(environ={}, flags={"port": int(it.url[17:])}), "echo", None) is None
        )
        it.answers["/admin/models"] = (200, {"models": models[:1], "devices": []})
        spec = remote.served(load(environ={}, flags={"port": int(it.url[17:])}), "echo", None)
        assert spec is not None
        assert spec.name == "a"


@pytest.mark.parametrize("key", ["ключ", "a b"])
def test_a_key_that_no_header_can_have(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12.25: it is named by its variable, and not shown."""
    monkeypatch.setenv("HEADRACE_API_KEY", key)
    with pytest.raises(ConfigError, match="HEADRACE_API_KEY has characters") as caught:
        Client("http://127.0.0.1:1")
    assert key not in caught.value.message
