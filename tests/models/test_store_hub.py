from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.models.builders import gguf, safetensors
from tests.models.fake_hub import COMMIT, FakeHub

from headrace.core.errors import UnknownModel
from headrace.models.reference import HubReference
from headrace.models.source_hub import SMALL, HubFile, choose

MODEL = gguf()
PROGRAM = """
import json, pathlib, sys
from headrace.models.reference import parse
from headrace.models.store import Store
home, action, text, stop = sys.argv[1:]
store, said = Store(pathlib.Path(home)), []
def progress(*report):
    said.append(report)
    if stop and report[0] == stop:
        raise KeyError("gave up")
try:
    if action == "remove":
        result = {"freed": store.remove(text)}
    else:
        result = {"path": str(store.fetch(parse(text), progress))}
except Exception as error:
    result = {"error": type(error).__name__, "message": str(error)}
models = [[m.name, m.size, m.revision] for m in store.list()]
print(json.dumps(result | {"said": said, "models": models}))
"""

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {
        "README.md": b"# model",
        "model-Q4_K_M.gguf": gguf()[:-32] + b"\4" * 32,
        "model-Q8_0.gguf": MODEL,
        "mmproj-F16.gguf": b"GGUF",
    }
    with FakeHub(files).running() as hub:
        yield hub


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Run:
    """Use a store in a process of its own: the hub's client reads its variables once."""

    def run(text: str, action: str = "fetch", stop: str = "", **variables: str) -> dict[str, Any]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and "proxy" not in k.lower()
        }
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "home"), action, text, stop],
            env=kept | own | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def cached(tmp_path: Path) -> list[str]:
    blobs = (tmp_path / "hf").rglob("blobs/*")
    return [path.name for path in blobs]


def test_a_model_comes_from_the_hub_once(run: Run, hub: FakeHub) -> None:
    """W1: a hub model is fetched on demand into the hub's cache, and found again without it."""
    first = run("hub:org/model")
    assert Path(first["path"]).name == "model-Q8_0.gguf"
    assert Path(first["path"]).read_bytes() == MODEL
    # With its projector of images.
    size = len(MODEL) + len(hub.files["mmproj-F16.gguf"])
    assert (Path(first["path"]).parent / "mmproj-F16.gguf").exists()
    assert first["models"] == [["hub:org/model", size, COMMIT]]
    downloads = [report for report in first["said"] if report[0] == "downloading"]
    assert downloads[-1] == ["downloading", size, size]
    hub.requests.clear()
    assert run("hub:org/model")["path"] == first["path"]
    assert not hub.requests


def test_files_are_named_by_quantisation_or_name(run: Run) -> None:
    assert run("hub:org/model:q4_k_m")["path"].endswith("model-Q4_K_M.gguf")
    assert run("hub:org/model:model-Q8_0.gguf@main")["path"].endswith("model-Q8_0.gguf")
    answer = run("hub:org/model:Q2_K")
    assert answer["error"] == "UnknownModel"
    assert "It has: model-Q4_K_M.gguf, model-Q8_0.gguf" in answer["message"]


def test_safetensors_come_with_their_small_files_and_never_pickles(run: Run, hub: FakeHub) -> None:
    """W28: neither code nor pickles of a repository are fetched."""
    hub.files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors({"a": ("F32", (2,), 8)}),
        "consolidated.safetensors": b"twice",
        "pytorch_model.bin": b"\x80\2",
        "modeling.py": b"import os",
        "onnx/model.json": b"{}",
    }
    path = Path(run("hub:org/model")["path"])
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    hub.files = {"pytorch_model.bin": b"\x80\2", "config.json": b"{}"}
    answer = run("hub:org/model@main")
    assert answer["error"] == "UnknownModel"
    assert "pickles are not loaded" in answer["message"]


def test_a_broken_download_goes_on_where_it_was(run: Run, hub: FakeHub) -> None:
    hub.files["model-Q8_0.gguf"] = large = gguf(tensors=[("t", (512, 1024 * 10), 0)])
    hub.break_after = 15 << 20
    answer = run("hub:org/model:Q8_0")
    assert Path(answer["path"]).read_bytes() == large
    assert hub.ranges == ["bytes=10485760-"]  # the client writes 10 MiB at a time
    assert hub.downloads() == ["model-Q8_0.gguf"] * 2 + ["mmproj-F16.gguf"]


@pytest.mark.parametrize("stop", ["asking the hub", "downloading", "verifying"])
def test_giving_up_leaves_nothing_half_done(run: Run, tmp_path: Path, stop: str) -> None:
    answer = run("hub:org/model", stop=stop)
    assert (answer["error"], answer["models"]) == ("KeyError", [])
    assert not [name for name in cached(tmp_path) if "incomplete" in name]
    assert Path(run("hub:org/model")["path"]).read_bytes() == MODEL


def test_other_bytes_than_promised_are_removed(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.tampered = True
    answer = run("hub:org/model")
    assert answer["error"] == "UpstreamError"
    assert "sha256" in answer["message"]
    assert not cached(tmp_path)
    hub.tampered = False
    assert Path(run("hub:org/model")["path"]).read_bytes() == MODEL


def test_offline_the_cache_serves(run: Run, tmp_path: Path) -> None:
    """W1: offline mode and a hub that is down fall back to what is in the hub's cache."""
    answer = run("hub:org/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "UpstreamError"
    assert "HF_HUB_OFFLINE" in answer["message"]
    path = run(f"hub:org/model:Q4_K_M@{COMMIT}")["path"]
    for record in (tmp_path / "home/models/records").iterdir():
        record.unlink()
    assert run(f"hub:org/model@{COMMIT}", HF_HUB_OFFLINE="1")["path"] == path
    nowhere = "http://127.0.0.1:9"
    assert run(f"hub:org/model:Q4_K_M@{COMMIT}", HF_ENDPOINT=nowhere)["path"] == path


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (401, "RepoNotFound", "UnknownModel", "no such repository"),
        (404, "RepoNotFound", "UnknownModel", "no such repository"),
        (403, "GatedRepo", "Unauthorized", "HF_TOKEN"),
        (400, "", "UpstreamError", "answered 400"),
        (500, "", "UpstreamError", "answered 500"),
    ],
)
def test_refusals_are_told_apart(run: Run, hub: FakeHub, status, code, error, message) -> None:
    """W17: the client's exceptions become ours, with what to do about them."""
    hub.refused = (status, code)
    answer = run("hub:org/model")
    assert answer["error"] == error
    assert message in answer["message"]


def test_an_unknown_revision_is_named(run: Run) -> None:
    answer = run("hub:org/model@v9")
    assert (answer["error"], "revision v9" in answer["message"]) == ("UnknownModel", True)


def test_a_hub_that_is_not_there_is_told_as_that(run: Run) -> None:
    answer = run("hub:org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "UpstreamError"
    assert "cannot be reached" in answer["message"]


def test_removing_takes_the_bytes_from_the_cache(run: Run, tmp_path: Path) -> None:
    run("hub:org/model:Q8_0")
    run("hub:org/model:Q4_K_M")
    first = run("hub:org/model:Q4_K_M", "remove")
    assert first["freed"] == 0  # the other model still needs the revision
    assert [name for name, _, _ in first["models"]] == ["hub:org/model:Q8_0"]
    last = run("hub:org/model:Q8_0", "remove")
    assert last["freed"] >= 2 * len(MODEL)
    assert (last["models"], cached(tmp_path)) == ([], [])


def names(reference: str, *files: HubFile) -> list[str]:
    repo, _, quantization = reference.partition(":")
    chosen = choose(HubReference(repo, quantization=quantization or None), files)
    return [file.name for file in chosen]


def test_the_choice_among_quantisations() -> None:
    """Q8_0 while it is small, else Q4_K_M, else what else is preferred, else the smallest."""
    large, small = HubFile("m.Q8_0.gguf", SMALL + 1), HubFile("m.Q8_0.gguf", SMALL)
    usual, rest = HubFile("m.q4_k_m.gguf", 50), (HubFile("a.gguf", 9), HubFile("b.gguf", 8))
    assert names("o/r", usual, small) == ["m.Q8_0.gguf"]
    assert names("o/r", usual, large) == ["m.q4_k_m.gguf"]
    assert names("o/r", large, *rest) == ["m.Q8_0.gguf"]
    assert names("o/r", *rest) == ["b.gguf"]
    assert names("o/r:Q4_K_M", small, usual) == ["m.q4_k_m.gguf"]
    with pytest.raises(UnknownModel, match="no such file"):
        names("o/r:Q4_K", usual)


def test_split_models_are_taken_whole() -> None:
    parts = [HubFile(f"Q4_K_M/m-Q4_K_M-0000{n}-of-00002.gguf", 5) for n in (1, 2)]
    assert names("o/r", *parts) == [part.name for part in parts]
    assert names("o/r:Q4_K_M", *parts) == [part.name for part in parts]
    with pytest.raises(UnknownModel):
        names("o/r", parts[0])
