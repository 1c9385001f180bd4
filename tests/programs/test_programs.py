"""Each program as `headrace connect` sets it up: an answer, and a loop that reads a file.

The echo engine repeats the last message: written as a call, it becomes one, and the result of a
tool becomes the answer.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.cli.programs import PROGRAM, headrace
from tests.programs.conftest import PREFIX

pytestmark = [pytest.mark.programs, pytest.mark.timeout(300)]

Noted = Callable[[str, object], None]
PROMPT = "Name-three-rivers."
NOTES = "notes.txt"


class Program(NamedTuple):
    """How a program takes a prompt, and the tool it reads a file with."""

    arguments: tuple[str, ...]
    tool: tuple[str, str, str] | None = None
    """Name, argument and its value; `{}` is the path of the file."""
    freely: tuple[str, ...] = ()
    """Arguments with which it uses its tools unasked."""


PROGRAMS = {
    "codex": Program(("exec", "--skip-git-repo-check"), ("exec_command", "cmd", "cat {}")),
    "claude-code": Program(("-p",), ("Read", "file_path", "{}")),
    "copilot": Program(("-p",), ("view", "path", "{}"), ("--allow-all-tools",)),
    "opencode": Program(("run",), ("read", "filePath", "{}")),
    "qwen-code": Program(("-p",), ("read_file", "file_path", "{}"), ("-y",)),
    "continue": Program(("-p",), ("Read", "filepath", "{}")),
    "aider": Program(("--yes-always", "--no-git", "--no-stream", "--message")),
    "llm": Program((), ("read_file", "path", "{}"), ("--functions", "tools.py")),
}
EXECUTABLES = {"claude-code": "claude", "continue": "cn", "qwen-code": "qwen"}


def version_of(client: str, environ: dict[str, str]) -> str:
    done = run((EXECUTABLES.get(client, client), "--version"), environ, PREFIX)
    match = re.search(r"\d+(?:\.\w+)+", done)
    assert match, done
    return match[0]


def run(command: Any, environ: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [*command],
        env=environ,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def connected(client: str, environ: dict[str, str], model: str = "echo") -> tuple[str, ...]:
    """Write the set-up; return the command, and add the variables to the environment."""
    done = headrace(environ, "connect", client, "--model", model, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    environ |= made["env"]
    return tuple(made["command"])


def with_arguments(command: tuple[str, ...], client: str, *more: str) -> tuple[str, ...]:
    """Return the command with the arguments of a prompt; opencode has flags after its verb."""
    arguments = PROGRAMS[client].arguments
    if client == "opencode":
        return (command[0], *arguments, *command[1:], *more)
    return (*command, *more[:-1], *arguments, *more[-1:])


@pytest.fixture
def noted(request: pytest.FixtureRequest, environ: dict[str, str], record_property: Noted) -> None:
    client = request.node.callspec.params["client"]
    record_property("client", client)
    record_property("version", version_of(client, environ))


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", PROGRAMS)
def test_it_answers(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14, shown 2: one prompt, with exactly what was written."""
    record_property("tried", "answer")
    command = connected(client, environ)
    assert PROMPT in run(with_arguments(command, client, PROMPT), environ, folder)


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", [name for name, program in PROGRAMS.items() if program.tool])
def test_it_uses_its_tools(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14, shown 2: the model calls for a file, and the answer has what is in it."""
    record_property("tried", "tools")
    program = PROGRAMS[client]
    assert program.tool
    (folder / "tools.py").write_text(
        'def read_file(path: str) -> str:\n    "Read a file."\n    return open(path).read()\n'
    )
    name, argument, value = program.tool
    arguments = {argument: value.format(folder / NOTES)}
    # opencode quotes a prompt with spaces.
    call = json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))
    if client != "codex":
        assert " " not in call
    command = connected(client, environ)
    prompt = f"<tool_call>{call}</tool_call>"
    answer = run(with_arguments(command, client, *program.freely, prompt), environ, folder)
    assert "The secret word is heron." in answer


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", ["aider"])
def test_it_edits_a_file(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14, shown 2: aider has no tools, and writes what the answer has as a file."""
    record_property("tried", "edits")
    command = connected(client, environ)
    prompt = f"{NOTES}\n```\nThe secret word is egret.\n```\n"
    run(with_arguments(command, client, prompt), environ, folder)
    assert (folder / NOTES).read_text() == "The secret word is egret.\n"


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", [name for name in PROGRAMS if name != "llm"])
def test_it_is_started(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14.7: `--run` gives it a set-up of its own, and leaves its files as they are."""
    record_property("tried", "run")
    connect = (*PROGRAM, "connect", client, "--model", "echo", "--run", "--")
    arguments = PROGRAMS[client].arguments
    environ["HEADRACE_HOME"] = str(folder / ".headrace")
    assert PROMPT in run((*connect, *arguments, PROMPT), environ, folder)
    for file in Path(environ["HOME"]).rglob("*"):
        assert "headrace" not in file.name
        assert not (file.is_file() and file.name in {"opencode.json", "settings.json"})


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", ["llm"])
def test_a_real_model_answers(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14, shown 2."""
    record_property("tried", "answer of SmolLM2")
    command = connected(client, environ, "smollm2")
    assert run((*command, "Name a river.", "-o", "max_tokens", "8"), environ, folder).strip()


SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", ["codex"])
def test_it_answers_in_a_form(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 13, exact form: Codex sends its schema beside its tools."""
    record_property("tried", "schema")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    command = connected(client, environ, "forms")
    options = ("--output-schema", "schema.json", "-o", "answer.json")
    prompt = '{"word": "heron"}'
    run((*command, *PROGRAMS[client].arguments, *options, prompt), environ, folder)
    assert json.loads((folder / "answer.json").read_text()) == {"word": "heron"}


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize("client", ["codex"])
def test_it_applies_a_patch(
    client: str, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 13: for models that Codex knows this tool has a grammar, also without an engine's."""
    record_property("tried", "patch")
    patch = f"*** Begin Patch\n*** Add File: {folder / 'new.txt'}\n+egret\n*** End Patch\n"
    call = json.dumps({"name": "apply_patch", "arguments": {"input": patch}})
    command = connected(client, environ, "gpt-5.5")
    freely = "--dangerously-bypass-approvals-and-sandbox"
    prompt = f"<tool_call>{call}</tool_call>"
    run(with_arguments(command, client, freely, prompt), environ, folder)
    assert (folder / "new.txt").read_text() == "egret\n"
