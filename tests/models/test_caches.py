"""Issue 16: models of Ollama, LM Studio, llama.cpp and the hub's cache."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from pathlib import Path

import pytest
from tests.cli.programs import headrace
from tests.models.builders import gguf

from headrace.core.errors import InvalidRequest, LoadFailed
from headrace.models.caches import CachedModel, cached_models
from headrace.models.inspect import inspect
from headrace.models.store import Store

MODEL = gguf()


def write(path: Path, data: bytes = MODEL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def blob(store: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    write(store / "blobs" / f"sha256-{digest}", data)
    return f"sha256:{digest}"


def ollama(home: Path, name: str = "library/tiny/latest", **layers: bytes) -> None:
    store = home / ".ollama" / "models"
    described = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": blob(store, data)}
        for kind, data in layers.items()
    ]
    manifest = json.dumps({"layers": described}).encode()
    write(store / "manifests" / "registry.ollama.ai" / name, manifest)


def found(home: Path, **environ: str) -> list[CachedModel]:
    return [*cached_models({"HOME": str(home), **environ})]


def test_ollama(tmp_path: Path) -> None:
    params = json.dumps({"stop": ["<|im_end|>", "a\nb"], "temperature": 0.5}).encode()
    ollama(tmp_path, model=MODEL, params=params, system=b"Be brief.", template=b"{{ .Prompt }}")
    ollama(tmp_path, "someone/other/1b", model=MODEL + b"\0")
    ollama(tmp_path, "library/adapted/latest", model=MODEL, adapter=b"x")
    other, tiny = sorted(found(tmp_path), key=lambda model: model.name)
    assert (tiny.program, tiny.name, tiny.size) == ("ollama", "tiny:latest", len(MODEL))
    assert other.name == "someone/other:1b"
    assert 'SYSTEM """Be brief."""' in tiny.modelfile


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"{", b"[]", b'{"layers": [1]}', b'{"layers": [{"mediaType": "x"}]}', b"\xff"),
        *(b"[" * 200_000, b'{"layers": [' + b"1," * 2_000_000),
    ],
    ids=range(8),
)
def test_a_damaged_manifest_is_left_out(tmp_path: Path, manifest: bytes) -> None:
    store = tmp_path / ".ollama" / "models" / "manifests"
    write(store / "registry.ollama.ai" / "library" / "tiny" / "latest", manifest)
    assert found(tmp_path) == []


def test_a_digest_is_no_path(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", MODEL)
    manifest = {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": ""}]}
    for digest in (f"sha256:../../../../{secret.name}", str(secret), "sha256:" + "A" * 64):
        manifest["layers"][0]["digest"] = digest
        store = tmp_path / ".ollama" / "models" / "manifests"
        path = store / "registry.ollama.ai" / "library" / "tiny" / "latest"
        write(path, json.dumps(manifest).encode())
        assert found(tmp_path) == []


def test_the_other_programs(tmp_path: Path) -> None:
    studio = tmp_path / ".lmstudio" / "models" / "org" / "Tiny-GGUF"
    write(studio / "tiny-Q4_K_M.gguf")
    write(studio / "mmproj-tiny-f16.gguf")
    llama = tmp_path / "cache"
    write(llama / "org_Tiny-GGUF_Tiny-Q8_0.gguf")
    write(llama / "plain.gguf")
    snapshots = tmp_path / "hub" / "models--org--tiny" / "snapshots"
    write(snapshots / "aaa" / "config.json", b"{}")
    write(snapshots / "aaa" / "model.safetensors", b"x" * 9)
    write(snapshots / "bbb" / "model.safetensors", b"x")
    write(snapshots.parent / "refs" / "main", b"aaa\n")
    split = tmp_path / "hub" / "models--org--split" / "snapshots" / "ccc"
    for part in (1, 2):
        write(split / f"split-{part:05}-of-00002.gguf")
    models = found(tmp_path, LLAMA_CACHE=str(llama), HF_HUB_CACHE=str(tmp_path / "hub"))
    assert [(m.program, m.name, m.size, bool(m.projector)) for m in models] == [
        ("lmstudio", "tiny-Q4_K_M", 2 * len(MODEL), True),
        ("llama.cpp", "Tiny-Q8_0", len(MODEL), False),
        ("llama.cpp", "plain", len(MODEL), False),
        ("hub", "split", 2 * len(MODEL), False),
        ("hub", "tiny", 9, False),
    ]


def test_files_are_linked_and_checked(tmp_path: Path) -> None:
    """Issue 16: not copied; what is damaged leaves nothing; rm leaves the original."""
    store = Store(tmp_path / "home")
    source = write(tmp_path / "blobs" / f"sha256-{'0' * 64}")
    linked = store.import_links("tiny:1b", [source])
    assert linked.name.startswith("tiny-1b")
    assert linked.samefile(source)
    assert inspect(linked).architecture == "llama"
    other = store.import_links("tiny-1b", [source])
    assert {model.path for model in store.list()} == {str(linked), str(other)}
    store.remove(str(other))
    damaged = write(tmp_path / "bad.gguf", MODEL[:20])
    with pytest.raises(LoadFailed):
        store.import_links("bad", [damaged])
    assert len(store.list()) == 1
    assert store.remove(str(linked)) == 0
    assert (store.list(), source.exists()) == ([], True)
    with pytest.raises(InvalidRequest, match="not fetched by Headrace"):
        store.remove(str(source))


def test_the_command(tmp_path: Path) -> None:
    """Issue 16: listed, imported with Ollama's parameters, and never twice."""
    home = tmp_path / "user"
    params = json.dumps({"stop": ["<|im_end|>"], "temperature": 0.5, "mirostat": 1}).encode()
    ollama(home, model=MODEL, params=params, system=b"Be brief.")
    config = tmp_path / "headrace.toml"
    here = {**os.environ, "HOME": str(home), "HEADRACE_HOME": str(tmp_path / "home")}
    here |= {"HEADRACE_CONFIG": str(config)}
    config.write_text("")
    listed = headrace(here, "import")
    assert "tiny:latest  ollama" in listed.stdout, listed
    done = headrace(here, "import", "tiny", "--as", "tiny")
    assert done.returncode == 0, done.stderr
    assert "Left out: PARAMETER mirostat" in done.stdout
    model = tomllib.loads(config.read_text())["models"]["tiny"]
    assert model["defaults"] == {"temperature": 0.5, "stop": ["<|im_end|>"]}
    assert (model["system"], inspect(Path(model["model"])).architecture) == ("Be brief.", "llama")
    again = headrace(here, "import", "tiny", "--as", "tiny")
    assert (again.returncode, "has a model tiny already" in again.stderr) == (2, True)
    for folder, data in (("a", MODEL), ("b", MODEL), ("c", MODEL[:20])):
        write(
            home / ".lmstudio" / "models" / folder / "repo" / f"{folder.replace('b', 'a')}.gguf",
            data,
        )
    rest = headrace(here, "import", "--all")
    assert (rest.returncode, sorted(tomllib.loads(config.read_text())["models"])) == (
        1,
        ["a", "tiny", "tiny:latest"],
    ), rest.stderr
    assert f"Left out: c of lmstudio: {home}/.lmstudio/models/c/repo/c.gguf: " in rest.stderr
    assert "Left out: a of lmstudio: a was imported already" in rest.stderr
    removed = headrace(here, "rm", "--yes", "tiny")
    assert (removed.returncode, Path(model["model"]).exists()) == (0, False), removed.stderr
