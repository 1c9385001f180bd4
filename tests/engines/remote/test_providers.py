"""The table of providers, and how a remote model stands in the house."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec
import pytest
from pydantic import SecretStr
from tests.conftest import ROOT
from tests.engines.remote.rig import worker

from headrace import engines, runtime
from headrace.config import short_name
from headrace.core.errors import ConfigError
from headrace.core.model import Capabilities, ModelFile, ModelSpec, Task
from headrace.core.sampling import Sampling
from headrace.engines import remote
from headrace.engines.base import OpenRequest
from headrace.models.providers import PROVIDERS
from headrace.worker.sizing import Sizing
from headrace.worker.spec import OnProgress, WorkerSpec
from headrace.worker.worker import Worker

SPEC = ModelSpec(name="far", model="openai:gpt-x", options={"api_key": SecretStr("sk-hidden")})


def silent(what: str, done: int, total: int) -> None: ...


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_table_is_sound(name: str) -> None:
    """E: a base URL, a key variable, and deviations in our own words for each."""
    provider = PROVIDERS[name]
    assert re.fullmatch(r"[a-z0-9]+", name)
    assert re.fullmatch(r"[A-Z0-9_]+_KEY", provider.key)
    assert provider.sampling <= {*Sampling.__struct_fields__, "n"} - {"stop"}
    assert set(provider.renamed) <= provider.sampling
    assert provider.engine in engines.names()
    assert engines.about(provider.engine).remote
    if provider.base_url is not None:
        url = urlsplit(provider.base_url)
        assert url.scheme == ("http" if url.hostname == "127.0.0.1" else "https")
        assert not provider.base_url.endswith("/")
        assert provider.open == (url.hostname == "127.0.0.1")


def test_the_page_has_the_table() -> None:
    """The docs name every provider with its address and variable."""
    page = (ROOT / "docs/engines/openai.md").read_text()
    for name, one in PROVIDERS.items():
        if one.engine == "openai":
            row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
            assert one.title in row
            assert f"`{one.key}`" in row
            assert (one.base_url or "your own") in row
            assert ("not verified" in row) is not one.checked


def test_names() -> None:
    assert short_name("openai:gpt-5-mini") == "gpt-5-mini"
    assert short_name("openrouter:org/model-1:free") == "model-1:free"
    assert short_name("ollama:llama3.2:3b") == "llama3.2:3b"
    assert short_name("/models/a:b.gguf") == "a:b"


@pytest.mark.parametrize("engine", ["openai", "anthropic"])
def test_a_remote_model_takes_no_memory(engine: str, tmp_path: Path) -> None:
    """M6: nothing is booked, planned, measured or remembered for it."""
    file = ModelFile(path="gpt-x", format="remote", provider=engine)

    def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        del on_progress
        return WorkerSpec(model=spec, file=file, engine=engine)

    known = Sizing(resolve, tmp_path / "needs.json", {"cpu": 1})
    need = known.footprint(SPEC, silent)
    assert (need.devices, need.max_running, need.load_s) == ({}, 64, 0.0)
    known.remember(SPEC, {}, 0.1)
    assert known.footprint(SPEC, silent).devices == {}
    assert known.largest_context(SPEC, {"cpu": 1}) is None
    later = msgspec.structs.replace(SPEC, options={"api_key": SecretStr("sk-rotated")})
    opened = known.resolve(later, silent).model.options["api_key"]
    assert opened.get_secret_value() == "sk-rotated"
    assert "sk-hidden" not in (tmp_path / "needs.json").read_text()


def test_a_secret_among_the_options_is_sealed() -> None:
    """W3: wherever a specification or the metadata goes."""
    far = worker("http://127.0.0.1:1/v1")
    info = far.models()[0]
    assert info.options["api_key"] == "…"
    assert "sk-" not in f"{info!r} {far!r} {SPEC!r} {msgspec.json.encode(info)!r}"


def test_the_engine_follows_from_the_provider(tmp_path: Path) -> None:
    """W2: and the reason is told."""
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(tmp_path)}, cwd=tmp_path)
    found = runtime.describe(settings.model_spec("mistral:m-small"), settings.config)
    assert (found.id, found.engine, found.format) == ("m-small", "openai", "remote")
    assert "Mistral" in found.engine_reason
    assert isinstance(runtime.open_worker(SPEC, settings.config), Worker)
    assert runtime.providers()["mistral"].title == "Mistral"
    with pytest.raises(ConfigError, match="reads"):
        runtime.describe(
            settings.model_spec("mistral:m-small", {"engine": "llamacpp"}), settings.config
        )


@pytest.mark.parametrize(
    ("provider", "task", "has"),
    [
        ("groq", "rerank", "it has generate."),
        ("moonshot", "embed", "it has generate."),
        ("openai", "rerank", "it has generate, embed."),
    ],
)
def test_a_task_that_a_provider_lacks_is_refused(provider: str, task: Task, has: str) -> None:
    """W2: by its name and the task's, before anything is sent."""
    file = ModelFile(path="m", format="remote", provider=provider)
    request = OpenRequest(model=file, task=task, options={"api_key": SecretStr("sk-hidden")})
    title = PROVIDERS[provider].title
    with pytest.raises(ConfigError, match=f"{title} has no models for the task {task}; {has}"):
        engines.open_engine("openai", request)


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_is_granted_each_of_its_tasks(name: str) -> None:
    provider = PROVIDERS[name]
    assert provider.tasks[0] == "generate"
    assert ("embed" in provider.tasks, "rerank" in provider.tasks) == (
        provider.embeddings,
        provider.rerank,
    )
    file = ModelFile(path="m", format="remote", provider=name)
    for task in provider.tasks:
        request = OpenRequest(model=file, task=task)
        granted = remote.facts(request, provider, Capabilities()).capabilities
        assert granted.tasks == {task}


def test_an_engine_refuses_a_provider_of_another() -> None:
    file = ModelFile(path="c", format="remote", provider="anthropic")
    with pytest.raises(ConfigError, match="speaks to openai"):
        engines.open_engine("openai", OpenRequest(model=file))


def _lacking() -> list[tuple[str, Task]]:
    tasks: tuple[Task, ...] = get_args(Task)
    return [(name, t) for name, row in PROVIDERS.items() for t in tasks if t not in row.tasks]


@pytest.mark.parametrize(("provider", "task"), _lacking())
def test_a_task_that_the_provider_lacks_is_refused_at_the_check(
    tmp_path: Path, provider: str, task: Task
) -> None:
    """Issue 12.21: of the file, a variable or an argument, before anything is sent out."""
    file = tmp_path / "headrace.toml"
    file.write_text(f'[models.a]\nmodel = "{provider}:m"\ntask = "{task}"')
    where: dict[str, Any] = {"cwd": tmp_path, "environ": {"HOME": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"models\.a\.task: .* no models for the task") as caught:
        runtime.load_settings(**where)
    assert str(file) in caught.value.message
    file.unlink()
    with pytest.raises(ConfigError, match="argument task"):
        runtime.load_settings(**where).model_spec(f"{provider}:m", {"task": task})
    where["environ"] = {"HOME": str(tmp_path), "HEADRACE_TASK": task}
    with pytest.raises(ConfigError, match="environment HEADRACE_TASK"):
        runtime.load_settings(**where).model_spec(f"{provider}:m")


@pytest.mark.parametrize("engine", ["transformers", "sentence_transformers", "llamacpp"])
def test_a_task_that_the_engine_lacks_is_refused_at_the_check(tmp_path: Path, engine: str) -> None:
    """Issue 12.21: the same for the engine of a local model."""
    tasks: tuple[Task, ...] = get_args(Task)
    for task in {*tasks} - {*engines.about(engine).tasks}:
        settings = runtime.load_settings(cwd=tmp_path, environ={"HOME": str(tmp_path)})
        with pytest.raises(ConfigError, match=f"Engine {engine} has no models for the task {task}"):
            settings.model_spec("./x", {"engine": engine, "task": task})
