"""Adapters over HTTP: their names in every API, and changes to them while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters_made import gguf_adapter
from tests.service.serving import Service, served
from tests.tiny_gguf import tiny_gguf

from headrace.cli.app import run

FILE = """
[models.tiny]
model = "./tiny.gguf"
context_length = 256
chat_template = "{{ messages[0].content }}"
options = {slots = 2, threads = 1}

[models.tiny.adapters]
one = "./one.gguf"
two = {source = "./two.gguf", scale = 0.5, name = "second"}

[models.brief]
base = "tiny"
defaults = {max_tokens = 1}
"""
PROMPT = "The rivers of the north are"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    tiny_gguf(path / "tiny.gguf", smollm2_path)
    for seed, name in enumerate(("one", "two", "three")):
        gguf_adapter(path / f"{name}.gguf", seed)
    (path / "headrace.toml").write_text(FILE)
    return path


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    environment = {"CONFIG": str(folder / "headrace.toml"), "HOME": str(folder / "home")}
    with served(environment=environment) as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def completed(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def listed(http: httpx.Client) -> dict[str, Any]:
    return {card["id"]: card for card in http.get("/v1/models").json()["data"]}


def test_names(http: httpx.Client) -> None:
    """Issue 17.4: `base:adapter` and names of their own, with `root` and `parent` as vLLM has."""
    cards = listed(http)
    assert list(cards) == ["tiny", "brief", "tiny:one", "second"]
    own = cards["second"]
    assert (own["aliases"], own["root"], own["parent"]) == (["tiny:two"], "two.gguf", "tiny")
    assert (own["base"], own["adapter"]) == ("tiny", True)
    base = cards["tiny"]
    assert (base["root"], base["parent"], base["adapter"]) == ("tiny.gguf", None, False)
    assert (cards["brief"]["base"], cards["brief"]["parent"]) == ("tiny", None)
    assert http.get("/v1/models/tiny:two").json()["id"] == "second"
    tags = [model["name"] for model in http.get("/api/tags").json()["models"]]
    assert tags == ["tiny:latest", "brief:latest", "tiny:one", "second:latest", "tiny:two"]


def test_answers(http: httpx.Client, service: Service) -> None:
    """Issue 17.4: one process answers for all, each by its adapter, in all APIs."""
    texts = {name: completed(http, name) for name in ("tiny", "tiny:one", "second", "tiny:two")}
    assert texts["second"] == texts["tiny:two"]
    assert len({*texts.values()}) == 3
    assert completed(http, "tiny") == texts["tiny"]
    assert len(service.workers()) == 1
    settings: dict[str, Any] = {"temperature": 0, "num_predict": 8, "repeat_penalty": 1}
    for name, tagged in (("tiny", "tiny:latest"), ("tiny:one", "tiny:one"), ("second", "second")):
        given = {"model": tagged, "prompt": PROMPT, "raw": True, "stream": False}
        answer = http.post("/api/generate", json=given | {"options": settings}).json()
        assert answer["response"], answer
        assert texts[name].startswith(answer["response"]), (name, answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ],
)
def test_an_unknown_adapter_is_404(path: str, body: dict[str, Any], http: httpx.Client) -> None:
    """Issue 17.4: in each API, and never the model without it."""
    answer = http.post(path, json=body | {"model": "tiny:none"})
    assert answer.status_code == 404, answer.text
    assert "tiny:none" in answer.text


def test_figures_name_the_adapter(http: httpx.Client) -> None:
    """Issue 17.4: the label of a model is the name that is served, of an alias too."""
    completed(http, "tiny:one")
    completed(http, "tiny:two")
    of_tokens = "headrace_completion_tokens_total{"
    lines = http.get("/metrics").text.splitlines()
    series = [line for line in lines if line.startswith(of_tokens)]
    for name in ("tiny:one", "second"):
        assert any(f'"{name}"' in line for line in series), series
    assert not any('"tiny:two"' in line for line in series)
    rates = {row["model"] for row in http.get("/admin/activity").json()["rates"]}
    assert {"tiny:one", "second"} <= rates


def test_an_adapter_is_in_the_estimate(http: httpx.Client, folder: Path) -> None:
    """Issue 17.4: the ledger counts the sizes of the files."""
    parts = http.get("/admin/plan", params={"model": "tiny"}).json()["need"]["parts"]
    sizes = [(folder / f"{name}.gguf").stat().st_size for name in ("one", "two")]
    assert parts["adapters"] == sum(sizes)


def test_adapters_change_while_it_serves(http: httpx.Client, folder: Path) -> None:
    """Issue 17.4: added and removed by admin; one that does not fit changes nothing."""
    before = completed(http, "tiny:one")

    def update(**adapters: Any) -> httpx.Response:
        settings = {"adapters": adapters}
        return http.post("/admin/models/update", json={"model": "tiny", "settings": settings})

    one, three = (str(folder / f"{name}.gguf") for name in ("one", "three"))
    gguf_adapter(folder / "other.gguf", 9, architecture="qwen2")
    refused = update(one=one, other=str(folder / "other.gguf"))
    assert refused.status_code == 400
    assert "Adapter other" in refused.text
    assert "made for qwen2, and the model is llama" in refused.text
    taken = update(one={"source": one, "name": "brief"})
    assert (taken.status_code, "already a name of tiny" in taken.text) == (400, True)
    assert "second" in listed(http)
    assert update(one=one, three={"source": three, "name": "third"}).status_code == 200
    assert list(listed(http)) == ["tiny", "brief", "tiny:one", "third"]
    assert completed(http, "tiny:one") == before
    assert completed(http, "third") not in {before, completed(http, "tiny")}
    gone = http.post("/v1/completions", json={"model": "second", "prompt": "x"})
    assert gone.status_code == 404


def test_adapters_by_routes_of_their_own(http: httpx.Client, folder: Path) -> None:
    """Issue 17.4: one is added and removed among the others, and its running request ends."""
    path, source = "/admin/models/tiny/adapters", str(folder / "three.gguf")
    before = [card["adapter"] for card in http.get(path).json()["data"]]
    body = {"adapter": "new", "source": source, "scale": 0.5, "name": "newest"}
    added = http.post(path, json=body)
    assert (added.status_code, added.json()["id"]) == (200, "tiny")
    cards = {card["adapter"]: card for card in http.get(path).json()["data"]}
    assert list(cards) == [*before, "new"]
    assert cards["new"] == {
        "adapter": "new",
        "id": "newest",
        "aliases": ["tiny:new"],
        "source": source,
    }
    assert completed(http, "newest") != completed(http, "tiny")
    running = {"model": "newest", "prompt": PROMPT, "max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=running) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert http.delete(f"{path}/new").status_code == 200
        rest = [*lines]
    assert "data: [DONE]" in rest
    assert not any('"error"' in line for line in rest)
    assert [card["adapter"] for card in http.get(path).json()["data"]] == before
    assert http.delete(f"{path}/new").status_code == 404
    assert http.post("/admin/models/none/adapters", json=body).status_code == 404


def test_as_vllm_loads_and_unloads(http: httpx.Client, folder: Path) -> None:
    """Issue 17.4: vLLM's routes, texts and errors; the adapter has its own name."""

    def order(action: str, **body: Any) -> httpx.Response:
        return http.post(f"/v1/{action}_lora_adapter", json=body)

    given = {"lora_name": "sql", "lora_path": str(folder / "three.gguf")}
    answer = order("load", **given)
    assert answer.status_code == 200, answer.text
    assert answer.text == "Success: LoRA adapter 'sql' added successfully."
    assert answer.headers["content-type"].startswith("text/plain")
    text = completed(http, "sql")
    again = order("load", **given)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    one = {"lora_name": "sql", "lora_path": str(folder / "one.gguf")}
    assert order("load", **one, load_inplace=True).status_code == 200
    assert completed(http, "sql") != text
    assert order("load", **given | {"lora_name": "x"}, model="none").status_code == 404
    missing = order("load", lora_name="x", lora_path=str(folder / "none.gguf"))
    assert (missing.status_code, "none.gguf" in missing.text) == (400, True)
    gone = order("unload", lora_name="sql")
    assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
    assert order("unload", lora_name="sql").status_code == 404
    assert "sql" not in listed(http)


def ready(http: httpx.Client) -> list[int]:
    """The processes that answer for the model."""
    (model,) = http.get("/admin/models").json()["models"]
    return [each["pid"] for each in model["replicas"] if each["state"] == "ready"]


def test_a_configuration_that_is_read_again(http: httpx.Client, folder: Path) -> None:
    """Issue 17.4, W32: what does not fit is refused with its reason, and all go on serving."""
    path, configured = folder / "headrace.toml", {"model": "tiny", "settings": {"adapters": None}}
    assert http.post("/admin/models/update", json=configured).status_code == 200
    before = completed(http, "tiny")
    (folder / "damaged.gguf").write_bytes((folder / "one.gguf").read_bytes()[:100])
    gguf_adapter(folder / "wide.gguf", 1, layers={"blk.0.attn_k.weight": (64, 32)})
    worker = ready(http)
    try:
        for wrong, reason in (
            ('"./none.gguf"', "none.gguf"),
            ('"./damaged.gguf"', "Adapter one: "),
            ('"./wide.gguf"', "is 32 x 32 in the model, and 64 x 32 in it"),
            (
                '{source = "./one.gguf", name = "second"}',
                "models.tiny.adapters: second is the name of an alias or adapter of tiny",
            ),
        ):
            path.write_text(FILE.replace('one = "./one.gguf"', f"one = {wrong}"))
            refused = http.post("/admin/reload")
            assert (refused.status_code, reason in refused.text) == (400, True), refused.text
            assert completed(http, "tiny") == before
    finally:
        path.write_text(FILE)
    assert http.post("/admin/reload").status_code == 200
    assert ready(http) == worker


def test_by_command(
    service: Service,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 17.4: `headrace adapters list|add|remove`."""
    monkeypatch.chdir(folder)

    def printed(*arguments: str) -> str:
        assert run(("adapters", *arguments, "--url", service.url)) == 0
        return capsys.readouterr().out

    added = printed("add", "tiny", "cli", "./three.gguf", "--name", "by-command")
    assert added.startswith("cli was added; tiny is ")
    rows = [line.split() for line in printed("list", "tiny").splitlines()]
    assert rows[0] == ["ADAPTER", "NAMES", "SOURCE"]
    assert rows[-1] == ["cli", "by-command,", "tiny:cli", str(folder / "three.gguf")]
    assert printed("remove", "tiny", "cli").startswith("cli was removed")
    assert "by-command" not in printed("list", "tiny")
    assert run(("adapters", "remove", "tiny", "cli", "--url", service.url)) == 2
    assert "no adapter 'cli'" in capsys.readouterr().err
