"""What a user can cause has its sentence: "unexpected" is for what could not be foreseen."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.programs import PROGRAM

from headrace.cli.app import run

Arguments = tuple[str, ...]


def program(
    environ: dict[str, str], line: str, variables: dict[str, str], stdin: bytes = b""
) -> tuple[Any, ...]:
    """Run a line of the shell with the program as `$H`; return code, stdout and stderr."""
    done = subprocess.run(
        ["sh", "-c", f'H() {{ "$0" -c "$CODE" "$@"; }}; {line}', PROGRAM[0]],
        env={**environ, "CODE": PROGRAM[2], **variables},
        cwd=environ["HOME"],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_encoding_of_the_streams_has_not(
    environ: dict[str, str], encoding: str
) -> None:
    """Issue 12.25: no answer is lost; JSON keeps its value."""
    variables = {"PYTHONIOENCODING": encoding}
    code, out, _ = program(environ, "H run echo 'é 日本'", variables)
    first = "\\u00e9" if encoding == "ascii" else "é"
    assert (code, out.decode(encoding)) == (0, f"{first} \\u65e5\\u672c\n")
    code, out, _ = program(environ, "H run echo --json", variables, "é 日本".encode())
    assert (code, json.loads(out.decode(encoding))["text"]) == (0, "é 日本")
    code, _, err = program(environ, "H run nonsense-日 x", variables)
    assert (code, b"unexpected" in err) == (2, False)


def test_bytes_that_are_no_text(environ: dict[str, str]) -> None:
    """Issue 12.25: said so, for stdin and arguments."""
    code, _, err = program(environ, "H run echo", {}, b"a\xff")
    assert (code, err.startswith(b"error: stdin is not text in UTF-8")) == (2, True)
    code, _, err = program(environ, "H run echo \"$(printf '\\377')\"", {})
    assert (code, err) == (2, b"error: The prompt is not text in UTF-8.\n")
    posix = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, out, _ = program(environ, "H run echo é --json", posix)
    assert (code, json.loads(out)["text"]) == (0, "é")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(environ: dict[str, str], closed: str) -> None:
    """Issue 12.25: what can be written is, and the exit code holds."""
    code, out, err = program(environ, f"H run echo hi {closed}", {})
    assert code == 0
    assert out == (b"" if " >&-" in f" {closed}" else b"hi\n")
    assert (b"3 tokens" in err) == ("2>&-" not in closed)
    assert program(environ, f"H show no-such {closed}", {})[0] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["run echo hi", "ls"])
def test_a_full_disk_behind_stdout(environ: dict[str, str], command: str) -> None:
    """Issue 12.25: it is named once, whether a line or the end of the program writes to it."""
    code, _, err = program(environ, f"H {command} >/dev/full", {"PYTHONUNBUFFERED": ""})
    assert (code, err) == (1, b"error: The system reports: No space left on device.\n")


@pytest.mark.usefixtures("as_environ")
@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("pull", "smollm2", "--home", "/proc/x"), 2, "Models cannot be kept under /proc/x/models"),
        (("run", "smollm2", "hi", "--home", "/proc/x"), 2, "Models cannot be kept under /proc/x"),
        (("bench", "--url", "{closed}/v1", "--model", "x", "--requests", "1"), 1, "refused"),
        (("bench", "--url", "no.invalid", "--model", "x", "--requests", "1"), 1, "No service"),
        (("ps", "--url", "{closed}"), 1, "No service at"),
        (("ps", "--url", "http://[::1"), 2, "is no URL"),
        (("run", "x", "hi", "--url", "ftp://x"), 2, "is no URL"),
        (("run", "echo", "hi", "--url", "{closed}"), 1, "cannot be reached"),
        (("run", "echo", "hi", "--local", "--url", "{closed}"), 2, "flag --local"),
        (("ls", "--config", "/"), 2, "Is a directory"),
        (("ls", "--config", "binary.toml"), 2, "binary.toml"),
        (("trace", "ls", "--home", "binary.toml"), 2, "Not a directory"),
        (("trace", "show", "x"), 2, "No trace of"),
        (("bench", "echo", "--prompts", "/", "--requests", "1"), 2, "--prompts"),
        (("bench", "compare", "a", "b"), 2, "a cannot be read"),
        (("serve", "echo", "--host", "nohost.invalid"), 2, "Cannot listen on nohost.invalid"),
        (("serve", "echo", "--port", "99999"), 2, "--port"),
        (("run", "echo", "hi", "--max-tokens", "9" * 30), 2, "max_tokens"),
        (("usage", "--since", "9" * 30 + "d"), 2, "--since"),
        (("tune", "nope"), 2, "No model is called"),
        (("check-engine", "nope", "--model", "x"), 2, "nope"),
        (("pull", "./nope.gguf"), 2, "There is nothing at"),
    ],
)
def test_each_has_a_sentence(
    environ: dict[str, str],
    arguments: Arguments,
    code: int,
    part: str,
    free_port: Callable[[], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 12.25: one line that names the cause, and the exit code of its kind."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    Path(environ["HOME"], "binary.toml").write_bytes(b"\xff\xfe")
    closed = f"http://127.0.0.1:{free_port()}"
    ended = run([word.format(closed=closed) for word in arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert (ended, last.startswith("error: "), "unexpected" in last) == (code, True, False), last
    assert part in last


@pytest.mark.usefixtures("as_environ")
@pytest.mark.parametrize("name", ["HEADRACE_API_KEY", "HEADRACE_ADMIN_KEY"])
@pytest.mark.parametrize(
    "arguments", [("ps",), ("run", "x", "hi", "--url", "http://127.0.0.1:1"), ("events",)]
)
def test_a_key_that_is_not_ascii(
    name: str,
    arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 12.25: the variable is named."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setenv(name, "ключ")
    assert run(arguments) == 2
    assert f"The key in {name} has characters" in capsys.readouterr().err


@pytest.mark.usefixtures("as_environ")
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("arguments", [("pull", "smollm2"), ("run", "smollm2", "hi")])
def test_a_home_that_cannot_be_written(
    number: int,
    arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 12.25: as on a file system that is mounted read-only, or is full."""

    def refuse(self: Path, **_: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run([*arguments]) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(number) in last
    assert "unexpected" not in last


def test_a_folder_that_has_been_removed(environ: dict[str, str]) -> None:
    """Issue 12.25: the current folder is gone."""
    code, _, err = program(environ, "mkdir d; cd d; rmdir ../d; H ls", {})
    assert (code, err) == (1, b"error: The current folder has been removed; change to another.\n")
