"""The program as a user starts it, on the built-in model."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import msgspec
import pytest
from tests.cli.programs import HELLO, PROGRAM, ask, headrace, serving

from headrace.api.chat import ChatRequest
from headrace.cli.app import _COMMANDS, _EXAMPLES, application, run
from headrace.core.sampling import SamplingFields, described

HEAVY = {"torch", "fastapi", "starlette", "httptools", "xllamacpp", "huggingface_hub", "numpy"}


@pytest.mark.parametrize(
    "program",
    [
        "import headrace",
        "from headrace.cli.app import run; assert run(['--version']) == 0",
        "from headrace.cli.app import run; assert run(['run', '--help']) == 0",
        "from headrace.cli.app import run; assert run(['serve', '--help']) == 0",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    environ: dict[str, str], program: str
) -> None:
    """W1: no engine, no torch and no web framework for `import headrace` and `--version`."""
    code = f"{program}\nimport sys, json\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded & HEAVY == set()
    assert [name for name in loaded if name.startswith("headrace.engines")] == []
    assert "headrace" in loaded


def test_a_command_imports_no_other_and_collects_garbage_when_it_runs(
    environ: dict[str, str],
) -> None:
    """Issue 10: a start takes what it needs; `ls` took twice the time."""
    code = """
import atexit, gc, sys
from headrace.cli import main
atexit.register(lambda: print(gc.isenabled(), sorted(m for m in sys.modules if "cli.b" in m)))
sys.argv = ["headrace", "ls"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True []"


def test_one_shot_from_arguments_and_stdin(environ: dict[str, str]) -> None:
    """L: the answer is on stdout, its figures are on stderr."""
    done = headrace(environ, "run", "echo", "hello", "world")
    assert (done.returncode, done.stdout) == (0, "hello world\n")
    assert "12 tokens" in done.stderr
    assert "tok/s, first token" in done.stderr
    done = headrace(environ, "run", "echo", "Sum up:", "--no-figures", stdin="one\ntwo\n")
    assert (done.stdout, done.stderr) == ("Sum up:\n\none\ntwo\n", "")
    done = headrace(environ, "run", "--raw", "--max-tokens", "3", stdin="x", cwd=_config(environ))
    assert done.stdout == "x\n"


def _config(environ: dict[str, str]) -> Path:
    home = Path(environ["HOME"])
    (home / "headrace.toml").write_text("default_model = 'echo'")
    return home


def test_the_load_of_a_one_shot_is_in_its_figures(environ: dict[str, str]) -> None:
    """Issue 12.24: the model was loaded for this answer."""
    done = headrace(environ, "--json", "run", "echo", "abc", "-o", "load_s=0.3")
    assert json.loads(done.stdout)["metrics"]["load_ms"] > 300


def test_one_shot_as_json(environ: dict[str, str]) -> None:
    """L, W16: `--json` prints the answer with usage and metrics as one object."""
    done = headrace(environ, "--json", "run", "echo", "abc", "--max-tokens", "2")
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["finish_reason"]) == ("ab", "length")
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["metrics"]["engine"] == "echo"


def test_verbose_prints_every_figure(environ: dict[str, str]) -> None:
    """W16: all figures can be seen."""
    told = headrace(environ, "run", "echo", "abc", "-v").stderr
    for name in ("queue_ms: ", "inter_token_ms.p99: ", "usage.total_tokens: ", "devices.cpu: "):
        assert name in told


@pytest.mark.usefixtures("as_environ")
def test_each_sampling_parameter_is_a_flag_with_its_help_and_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """L: what core/sampling.py declares, and nothing written down a second time."""
    assert run(["run", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, (_, meta) in described(SamplingFields).items():
        assert f"--{name.replace('_', '-')} " in shown
        assert (meta.description or "?") in shown
    assert "Randomness; 0 is greedy. [0 to 2]" in shown
    assert "[above 0 to 100]" in shown
    assert "Most tokens to generate. [0 or more]" in shown
    # Issue 12.32: openapi.json has the same ranges.
    (_, schemas) = msgspec.json.schema_components([ChatRequest])
    temperature = schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)


@pytest.mark.usefixtures("as_environ")
def test_the_help_has_groups_whole_summaries_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 12.30: every command is in a group, with two examples that begin with its name."""
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    for title in ("Ask:", "Models:", "Service:", "Observe:", "Measure:", "Set up:"):
        assert f"\n{title}\n" in shown
    assert "..." not in shown.partition("\n\n")[2]
    app = application()
    assert len(_COMMANDS) == len(app.registered_commands) + len(app.registered_groups)
    for name, (_, *lines) in _COMMANDS.items():
        assert [line.split()[0] for line in lines] == [name, name]
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"\n    headrace {line}\n" in shown for line in lines), name
        assert "[[" not in shown
    for group, commands in _EXAMPLES.items():
        assert run([group, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.partition("\nCommands:\n")[2]
        for name, lines in commands.items():
            assert run([group, name, "--help"]) == 0
            shown = capsys.readouterr().out
            assert all(f"\n    headrace {line}\n" in shown for line in lines), name


@pytest.mark.usefixtures("as_environ")
@pytest.mark.parametrize(
    ("arguments", "code", "kind", "part"),
    [
        (("run", "nothing-like-it", "x"), 2, "UnknownModel", "nothing-like-it"),
        (("run", "echo"), 2, "InvalidRequest", "There is no prompt"),
        (("run", "echo", "x", "-o", "tokns=1"), 2, "ConfigError", "tokns is no engine option"),
        (("run", "echo", "x", "-o", "slots"), 2, "ConfigError", "slots is not KEY=VALUE"),
        (("run", "echo", "x", "--top-p", "0.5"), 2, "Unsupported", "top_p"),
        (("run", "echo", "x", "--temperature", "9"), 2, "InvalidRequest", "between 0 and 2"),
        (("run", "echo", "x", "-o", "fail_load=boo"), 1, "LoadFailed", "boo"),
        (("run", "echo", "x", "-o", "fail_after=0"), 1, "GenerationFailed", ""),
        (("run", "echo", "x", "--engine", "ecko"), 2, "ConfigError", "Did you mean echo?"),
        (("ls", "--hom"), 2, "UsageError", "--hom"),
        (("ls", "--config", "no.toml"), 2, "ConfigError", "no.toml"),
        (("rm", "smollm2"), 2, "UnknownModel", "smollm2 is not on this machine"),
        (("serve", "echo", "--host", "0.0.0.0"), 2, "ConfigError", "no API key is set"),
        (("serve", "no-such"), 2, "UnknownModel", "no-such"),
        # Issue 12.16: it ends before it listens, whatever the other models are.
        (("serve", "smollm2", "./nope.gguf"), 2, "UnknownModel", "There is nothing at /"),
        (("serve", "echo", "./nope.gguf", "--port", "0"), 2, "UnknownModel", "nope.gguf."),
        # Issue 12.32
        (("run", "echo", "x", "-o", "thread=1"), 2, "ConfigError", "option. Did you mean threads?"),
        (("serve", "echo", "--port", "0", "-o", "fail_load=boo"), 1, "LoadFailed", "boo"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    environ: dict[str, str],
    arguments: tuple[str, ...],
    code: int,
    kind: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """L: exit codes mean something, and nobody sees a traceback."""
    done = headrace(environ, *arguments)
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert part in last
    assert "Traceback" not in done.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run([*arguments, "--json"]) == code
    body = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert body["error"]["type"] == kind
    assert part in body["error"]["message"]


def test_ctrl_c_ends_one_shot_with_130(environ: dict[str, str]) -> None:
    """L, W18: Ctrl-C ends it at once; what was said has been written."""
    slow = ("run", "echo", "word " * 200, "-o", "tokens_per_second=20")
    with subprocess.Popen(
        [*PROGRAM, *slow],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"w"
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_reader_that_leaves_is_no_error(environ: dict[str, str]) -> None:
    with subprocess.Popen(
        [*PROGRAM, "run", "echo", "word " * 9000],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""


def test_config_show_names_each_origin(environ: dict[str, str]) -> None:
    """W3: `config show` prints each value with its origin, secrets masked."""
    home = _config(environ)
    variables = {**environ, "HEADRACE_API_KEYS": "s3cret", "HEADRACE_ECHO__SLOTS": "4"}
    text = headrace(variables, "config", "show", "echo", "--home", "/h", cwd=home).stdout
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["home"].split()[1:] == ["/h", "flag", "--home"]
    assert rows["default_model"].endswith(f"file {home / 'headrace.toml'}")
    assert rows["server.api_keys"].endswith("environment HEADRACE_API_KEYS")
    assert rows["models.echo.options.slots"].endswith("environment HEADRACE_ECHO__SLOTS")
    assert "s3cret" not in text
    shown = json.loads(headrace(variables, "config", "show", "--json", cwd=home).stdout)
    assert shown["server.port"] == {"value": 11511, "origin": "default"}
    path = json.loads(headrace(environ, "config", "path", "--json", cwd=home).stdout)
    assert path["file"] == str(home / "headrace.toml")


def test_show_tells_engine_reason_and_options(environ: dict[str, str]) -> None:
    """W2, W22: which engine, why, and what can be set."""
    text = headrace(environ, "show", "echo", "-o", "slots=3").stdout
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert rows["engine"][1] == "echo"
    assert len(rows["engine reason"]) > 2
    assert rows["slots"][1:3] == ["3", "1024"]
    shown = json.loads(headrace(environ, "show", "echo", "--json").stdout)
    options = {one["option"]: one for one in shown["engine_options"]}
    assert options.keys() >= {"slots", "text"}
    described = {"type": "integer", "minimum": 1, "default": 1024, "choices": [], "live": False}
    assert described.items() <= options["slots"].items()
    settings = {one["setting"]: one for one in shown["settings"]}
    assert settings["keep_alive"]["live"]
    assert settings["continuation"]["choices"] == ["exact", "fast", "off"]


def test_doctor_tells_what_could_run(environ: dict[str, str]) -> None:
    """L, T6: engines, devices, memory, home and file."""
    found = json.loads(headrace(environ, "doctor", "--json").stdout)
    assert {engine["name"]: engine["available"] for engine in found["engines"]}["echo"] is True
    assert found["system"]["devices"][0]["total"] > 0
    assert found["home"]["free"] > 0
    text = headrace(environ, "doctor").stdout
    assert "echo" in text
    assert "none; " in text


def test_ls_of_an_empty_home(environ: dict[str, str]) -> None:
    assert json.loads(headrace(environ, "ls", "--json").stdout) == []
    assert "`headrace pull smollm2` fetches" in headrace(environ, "ls").stdout  # Issue 12.32
    assert not (Path(environ["HOME"]) / ".local").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(environ: dict[str, str], shell: str) -> None:
    """L: completion for shells, of commands and of models."""
    script = headrace({**environ, "_HEADRACE_COMPLETE": f"source_{shell}"}).stdout
    assert "_HEADRACE_COMPLETE" in script
    asked = {
        **environ,
        "_HEADRACE_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "headrace show smo",
        "COMP_WORDS": "headrace show smo",
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert "smollm2" in headrace(asked).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_lets_running_answers_end(
    environ: dict[str, str], number: signal.Signals
) -> None:
    """L, W8: after the signal nothing new is taken, what runs comes to its end, exit code 0."""
    slow = ("-o", "tokens_per_second=20")
    with serving({**environ, "HEADRACE_API_KEYS": "k"}, "echo", *slow) as (process, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url, HELLO)
        stream = ask(url, {**HELLO, "stream": True}, "k")
        first = stream.readline()
        process.send_signal(number)
        rest = (first + stream.read()).decode()
        assert rest.rstrip().endswith("data: [DONE]")
        text = "".join(
            choice["delta"].get("content") or ""
            for line in rest.splitlines()
            if line.startswith("data: {")
            for choice in json.loads(line[6:])["choices"]
        )
        assert text == "hello"
        assert process.wait(10) == 0
        with pytest.raises(urllib.error.URLError):
            ask(url, HELLO, "k")


def test_serve_ends_what_does_not_end_with_an_error(environ: dict[str, str]) -> None:
    """W8: after `drain_s` a stream gets an error event, never a normal end."""
    endless = ("-o", "tokens_per_second=10", "-o", f"text={'x' * 999}", "--drain-s", "0.5")
    with serving(environ, "echo", *endless) as (process, url):
        stream = ask(url, {**HELLO, "stream": True})
        stream.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = stream.read().decode()
        assert '"error"' in rest
        assert "[DONE]" not in rest
        assert process.wait(10) == 0
        assert 0.4 < time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("task", "field", "answer"),
    [
        ("generate", "choices", "Name three rivers."),
        ("embed", "data", '"embedding"'),
        ("rerank", "results", '"relevance_score"'),
    ],
)
def test_serve_says_how_to_ask(environ: dict[str, str], task: str, field: str, answer: str) -> None:
    """Issue 12.32: the example is for what the model does, and it works."""
    file = Path(environ["HOME"]) / "headrace.toml"
    file.write_text(f'[models.m]\nmodel = "echo"\ntask = "{task}"\n')
    command = [*PROGRAM, "serve", "m", "--port", "0", "--config", str(file)]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        line = process.stdout.readline().removeprefix("Try: ").replace("curl", "curl -sS", 1)
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        process.terminate()
        assert process.wait(10) == 0
    assert url in line
    assert field in json.loads(done.stdout), done.stdout
    assert answer in done.stdout


def test_an_address_in_use_is_said_in_one_line(environ: dict[str, str]) -> None:
    with serving(environ, "echo") as (_, url):
        port = url.rpartition(":")[2]
        done = headrace(environ, "serve", "echo", "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Cannot listen on 127.0.0.1:{port}: Address already")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--regex", "a+"], "does not support regex"),
        (["--choice", "a", "--choice", "b"], "does not support choice"),
        (["--grammar", "x.lark"], "does not support grammar"),
        (["--json-schema", "x.json"], "does not support JSON schemas"),
        (["--json-schema", "x.lark"], "x.lark is not a JSON schema"),
        (["--grammar", "missing"], "missing cannot be read"),
        (["--regex", "a", "--choice", "a"], "regex and choice are both given"),
    ],
)
def test_the_form_of_an_answer(
    flags: list[str],
    problem: str,
    as_environ: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 13, exact form: flags of run; the engine echo enforces none of them."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    Path("x.lark").write_text('start: "a"')
    Path("x.json").write_text('{"type": "null"}')
    assert run(["run", "echo", "hi", "--no-figures", *flags]) != 0
    assert problem in capsys.readouterr().err
