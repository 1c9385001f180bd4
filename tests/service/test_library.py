"""The library over HTTP: what fits here, and a pull by name, of a service with a hub of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.models.fake_hub import FakeHub
from tests.models.test_library import TINY
from tests.service.serving import Service, served
from tests.tiny_gguf import tiny_gguf

HUGE = TINY.replace(b"[tiny", b"[huge").replace(b"0.001", b"9000").replace(b"org/model", b"org/a")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    data = tiny_gguf(folder / "tiny.gguf", smollm2_path).read_bytes()
    with FakeHub({"tiny-Q8_0.gguf": data}).running() as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, hub: FakeHub) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    (home / "library.toml").write_bytes(TINY + HUGE)
    (home / "headrace.toml").write_text('[models.echo]\nmodel = "echo"\n')
    settings = {"CONFIG": str(home / "headrace.toml"), "HOME": str(home), "MEMORY": "cpu=4GB"}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        with served(environment=settings) as running:
            yield running


def library(service: Service, **wanted: str) -> list[dict[str, object]]:
    answer = httpx.get(f"{service.url}/admin/library", params=wanted, timeout=30)
    answer.raise_for_status()
    return answer.json()["data"]


def test_a_model_of_the_library_is_found_planned_and_pulled(service: Service) -> None:
    """Issue 16.3: words, what fits here, a pull by name with its states, and what is stored."""
    tiny, huge = library(service)
    assert (tiny["name"], tiny["fits"], tiny["stored"]) == ("tiny:1m", True, False)
    assert (huge["name"], huge["fits"], huge["tokens_per_second"]) == ("huge:1m", False, None)
    assert "needs" in str(huge["reason"])
    assert [m["name"] for m in library(service, q="huge mit")] == ["huge:1m"]
    assert library(service, fits="true") == [tiny]
    assert library(service, task="embed") == []
    body = {"model": "tiny:1m"}
    with httpx.stream("POST", f"{service.url}/api/pull", json=body, timeout=30) as pull:
        states = [json.loads(line)["status"] for line in pull.iter_lines()]
    assert (states[0], states[-1]) == ("pulling manifest", "success")
    assert [m["stored"] for m in library(service)] == [True, False]
    served = httpx.get(f"{service.url}/v1/models", timeout=30).json()["data"]
    assert "tiny:1m" in [m["id"] for m in served]


@pytest.mark.parametrize("query", ["fits=perhaps", "task=dance", "q=a&q=b", "size=3"])
def test_what_is_no_filter_is_refused(service: Service, query: str) -> None:
    answer = httpx.get(f"{service.url}/admin/library?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]
