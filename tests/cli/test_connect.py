"""Issue 14.7: `headrace connect` sets up the programs of others."""

from __future__ import annotations

import io
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.programs import headrace
from tests.cli.stub import Stub, stub

from headrace.cli import connect
from headrace.cli.app import run
from headrace.cli.client import Card
from headrace.cli.clients import CLIENTS
from headrace.cli.setups import Setup, Target, change_of, merged

URL = "http://127.0.0.1:11511"
MODEL = Card("coder é", state="ready", tools="native", context_length=65_536)
OTHER = Card("small", state="ready", tools="none", capabilities=("vision",))
CARDS: list[dict[str, Any]] = [
    {"id": "coder", "aliases": ["c"], "tasks": ["generate"], "context_length": 4096},
    {"id": "c", "tasks": ["generate"]},
    {"id": "vectors", "tasks": ["embed"]},
    {"id": "bad\x1b[2J", "tasks": ["generate"]},
]


def parsed(name: str, text: str) -> Any:
    if name.endswith(".toml"):
        return tomllib.loads(text)
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


def made(client: str, *, needs_key: bool = False) -> tuple[Setup, str, Any]:
    """Return a set-up, all of its text, and the content of its first file."""
    target = Target(URL, (MODEL, OTHER), needs_key=needs_key)
    setup = CLIENTS[client].build(target, Path("/home/me"))
    contents = [parsed(file.path.name, file.text) for file in setup.files]
    texts = [json.dumps(contents, ensure_ascii=False), *setup.env.values(), *setup.steps]
    return setup, "\n".join(texts), contents[0] if contents else None


@pytest.mark.parametrize("needs_key", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_setup_names_the_service_the_model_and_the_key(client: str, needs_key: bool) -> None:
    """Every file is of its format; a key is named by its variable, and asked for if needed."""
    setup, text, _ = made(client, needs_key=needs_key)
    everything = text + " ".join(setup.command)
    assert URL in text
    assert MODEL.id in everything or client == "open-webui"
    names_key = "HEADRACE_API_KEY" in text or "API key" in text
    # Qwen Code takes no endpoint without the name of a variable.
    assert names_key == (needs_key or client == "qwen-code")


@pytest.mark.parametrize("client", [name for name, entry in CLIENTS.items() if entry.run])
def test_a_setup_of_its_own_writes_nothing_into_the_home(client: str, tmp_path: Path) -> None:
    run = CLIENTS[client].run
    assert run
    setup = run(Target(URL, (MODEL,), needs_key=True), tmp_path)
    assert all(file.path.parent == tmp_path for file in setup.files)
    text = " ".join([*setup.command, *setup.env.values(), *(f.text for f in setup.files)])
    assert "127.0.0.1" in text
    assert "HEADRACE_API_KEY" in text


def test_what_files_have() -> None:
    """Where a program looks for what; scripts/test-programs runs them with it."""
    assert made("codex")[2] == {
        "model": "coder é",
        "model_provider": "headrace",
        "model_context_window": 65_536,
        "model_providers": {
            "headrace": {"name": "Headrace", "base_url": f"{URL}/v1", "wire_api": "responses"}
        },
    }
    env = made("claude-code")[2]["env"]
    assert env["ANTHROPIC_BASE_URL"] == URL
    assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
    env = made("copilot", needs_key=True)[0].env
    assert env["COPILOT_PROVIDER_API_KEY"] == "$HEADRACE_API_KEY"
    assert env["COPILOT_PROVIDER_MAX_PROMPT_TOKENS"] == "49152"
    models = made("continue")[2]["models"]
    assert [model["capabilities"] for model in models] == [["tool_use"], ["image_input"]]
    assert models[0]["defaultCompletionOptions"] == {"contextLength": 65_536}
    assert "defaultCompletionOptions" not in models[1]
    provider = made("opencode", needs_key=True)[2]["provider"]["headrace"]
    assert provider["options"]["apiKey"] == "{env:HEADRACE_API_KEY}"
    assert provider["models"]["coder é"]["limit"] == {"context": 65_536, "output": 16_384}
    [editor] = made("vscode")[2]
    assert editor["models"][0]["maxInputTokens"] == 49_152
    assert [model["toolCalling"] for model in editor["models"]] == [True, False]
    assert made("litellm", needs_key=True)[2]["model_list"][0]["litellm_params"] == {
        "model": "openai/coder é",
        "api_base": f"{URL}/v1",
        "api_key": "os.environ/HEADRACE_API_KEY",
    }


@pytest.fixture
def service(as_environ: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A service that lists models, whose address is configured."""
    with stub({"/v1/models": (200, {"data": CARDS})}) as it:
        monkeypatch.setenv("HEADRACE_URL", it.url)
        yield it


def test_it_shows_what_it_writes_and_writes_only_what_is_confirmed(
    service: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines that change are shown; --print, a no, and no terminal to ask on write nothing."""
    path = Path.home() / ".codex" / "headrace.config.toml"
    assert run(["connect", "codex", "--print"]) == 0
    out, err = capsys.readouterr()
    assert f"# {path}:\n# Written by `headrace connect`.\n" in out
    assert out.endswith("\ncodex --profile headrace\n")
    assert "coder has a context of 4096 tokens; Codex CLI begins with a prompt of about" in err
    assert run(["connect", "codex"]) == 2
    assert "Nothing was written; --yes confirms it" in capsys.readouterr().err
    monkeypatch.setattr(connect.streams, "is_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\ny\n"))
    assert run(["connect", "codex"]) == 130
    assert not path.exists()
    assert run(["connect", "codex"]) == 0
    out, err = capsys.readouterr()
    assert '+model = "coder"' in err
    assert out.endswith("codex --profile headrace\n")
    # What it wrote it changes without a copy, and what is as it should be not at all.
    before = path.read_text()
    assert run(["connect", "codex", "--model", "c"]) == 0
    assert "+" not in capsys.readouterr().err
    assert before == path.read_text()
    path.write_text(before.replace("4096", "1"))
    assert run(["connect", "codex", "--yes"]) == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == before


def test_what_others_wrote_is_kept(service: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of others is merged with and copied; one that cannot be merged with is left alone."""
    path = Path.home() / ".config" / "opencode" / "opencode.json"
    path.parent.mkdir(parents=True)
    mine = {"theme": "dark", "provider": {"mine": {"a": 1}, "headrace": {"models": {"old": {}}}}}
    path.write_text(json.dumps(mine))
    assert run(["connect", "opencode", "--yes"]) == 0
    assert f"What was there is in {path}.before-headrace." in capsys.readouterr().err
    config = json.loads(path.read_text())
    assert (config["theme"], config["provider"]["mine"]) == ("dark", {"a": 1})
    assert [*config["provider"]["headrace"]["models"]] == ["coder"]
    copy = path.with_name("opencode.json.before-headrace")
    assert json.loads(copy.read_text()) == mine
    path.write_text("// mine\n{}")
    assert run(["connect", "opencode", "--yes"]) == 2
    assert "it is not plain JSON" in capsys.readouterr().err
    assert path.read_text() == "// mine\n{}"
    path.write_text("{}")
    assert run(["connect", "opencode", "--yes"]) == 0
    assert path.with_name("opencode.json.before-headrace1").read_text() == "{}"


def test_a_list_of_others_gets_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm has one file for models of all servers; our part of it is replaced."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))

    def write(card: Card) -> list[dict[str, Any]]:
        [file] = CLIENTS["llm"].build(Target(URL, (card,)), tmp_path).files
        if change := change_of(file):
            file.path.write_text(change.after)
        assert change_of(file) is None
        return yaml.safe_load(file.path.read_text())

    path = tmp_path / "extra-openai-models.yaml"
    path.write_text("- model_id: mine\n  model_name: m")
    assert [model["model_id"] for model in write(MODEL)] == ["mine", "headrace/coder é"]
    path.write_text(path.read_text() + "- model_id: last\n  model_name: l\n")
    names = [model["model_id"] for model in write(OTHER)]
    assert names == ["mine", "headrace/small", "last"]
    path.write_text("models:\n  - a\n")
    with pytest.raises(Exception, match="no plain list"):
        write(MODEL)


def test_folders_are_those_that_the_client_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables move the files of a client."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    monkeypatch.setenv("CODEX_HOME", "/c")
    monkeypatch.setattr(sys, "platform", "linux")
    clients = ("codex", "opencode", "llm", "vscode")
    assert [str(made(client)[0].files[0].path) for client in clients] == [
        "/c/headrace.config.toml",
        "/x/opencode/opencode.json",
        "/x/io.datasette.llm/extra-openai-models.yaml",
        "/x/Code/User/chatLanguageModels.json",
    ]
    monkeypatch.setattr(sys, "platform", "darwin")
    path = made("vscode")[0].files[0].path
    assert path.parent == Path("/home/me/Library/Application Support/Code/User")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": None}, {"a": {"c": 2}}, {"a": {"c": 2}}),
        ([{"name": "x", "v": 1}, 5], [{"name": "x", "v": 2}], [5, {"name": "x", "v": 2}]),
    ],
)
def test_json_is_merged(old: Any, new: Any, expected: Any) -> None:
    assert merged(old, new) == expected


def test_what_cannot_be_merged_is_refused() -> None:
    for old, new in (({}, []), ([], {}), ("a", {}), ({}, "a")):
        with pytest.raises(ValueError, match="an object is where"):
            merged(old, new)


def test_mistakes_are_named(service: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    cases: Mapping[tuple[str, ...], str] = {
        ("kodex",): "The client kodex is unknown; did you mean codex?",
        ("codex", "--model", "none"): f"not served at {service.url}; there is coder.",
        ("codex", "--", "exec"): "Arguments for the client go with --run.",
        ("vscode", "--run"): "VS Code cannot be started",
        ("codex", "--url", "http://127.0.0.1:1"): "No service at",
    }
    for arguments, message in cases.items():
        assert run(["connect", *arguments]) in (1, 2)
        assert message in capsys.readouterr().err, arguments
    service.answers["/v1/models"] = (200, {"data": [{"id": "a"}, {"id": "b"}]})
    assert run(["connect", "codex"]) == 2
    assert "Name a model of the service with --model: a, b." in capsys.readouterr().err


def test_all_clients_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a client, and without a service."""
    assert run(["connect", "--json"]) == 0
    assert [entry["client"] for entry in json.loads(capsys.readouterr().out)] == [*CLIENTS]


def test_a_client_is_started(environ: dict[str, str], service: Stub, tmp_path: Path) -> None:
    """It becomes the client, which gets its arguments and the key; its home stays empty."""
    program = tmp_path / "bin" / "aider"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$OPENAI_API_KEY $*"; cat "$2"\n')
    program.chmod(0o755)
    variables = {**environ, "HEADRACE_URL": service.url, "HEADRACE_API_KEY": "k"}
    variables |= {"HEADRACE_HOME": str(tmp_path / "state"), "PATH": f"{program.parent}:/bin"}
    done = headrace(variables, "connect", "aider", "--run", "--", "--message", "a b")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "state" / "clients" / "aider.yml"
    assert done.stdout == f"k --config {file} --message a b\n{file.read_text()}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".aider")]
    assert service.asked[0][3] == "Bearer k"
    variables["PATH"] = "/bin"
    done = headrace(variables, "connect", "codex", "--run")
    assert "Codex CLI is not installed: there is no codex in PATH." in done.stderr
