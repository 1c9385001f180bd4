"""headrace batch: by itself and on a service, ended early and begun again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.programs import PROGRAM, headrace, serving

from headrace.cli.app import run

CHAT = "/v1/chat/completions"


def line(id: str, **body: Any) -> str:
    messages = [{"role": "user", "content": f"say {id}"}]
    full = {"model": "echo", "messages": messages, **body}
    return json.dumps({"custom_id": id, "method": "POST", "url": CHAT, "body": full}) + "\n"


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    counts = Counter(each["custom_id"] for each in lines)
    assert set(counts.values()) <= {1}, "a line is answered twice"
    return {each["custom_id"]: each["response"] for each in lines}


@pytest.fixture
def home(environ: dict[str, str]) -> Path:
    return Path(environ["HOME"])


def test_by_itself(environ: dict[str, str], home: Path) -> None:
    """Issue 14.6: the models are loaded for the command; errors are lines, and what is done stays.

    A body that is for another model goes to the one that is named.
    """
    requests, out = home / "in.jsonl", home / "out.jsonl"
    embed = {"custom_id": "e", "method": "POST", "url": "/v1/completions"}
    embed |= {"body": {"model": "gpt-5", "prompt": "abc"}}
    bad = line("bad", temperature=9)
    requests.write_text(line("a") + bad + "\n" + json.dumps(embed))
    command = ("batch", str(requests), "-o", str(out), "--model", "echo", "--local")
    first = headrace(environ, *command, "--json")
    assert first.returncode == 1, first.stderr
    assert "bad: 400 temperature must be between 0 and 2." in first.stderr
    figures = json.loads(first.stdout)
    assert [figures[name] for name in ("requests", "before", "answered", "failed")] == [3, 0, 2, 1]
    assert figures["completion_tokens"] == len("say a") + len("abc") + 2
    read = answers(out)
    assert read["a"]["body"]["choices"][0]["message"]["content"] == "say a"
    assert (read["e"]["body"]["choices"][0]["text"], read["bad"]["status_code"]) == ("abc", 400)
    again = headrace(environ, *command)
    assert (again.returncode, again.stdout) == (1, "")
    assert "0 answered; 3 before (1 failed; --retry-failed" in again.stderr
    requests.write_text(requests.read_text().replace(bad, line("bad")))
    mended = headrace(environ, *command, "--retry-failed")
    assert mended.returncode == 0, mended.stderr
    assert answers(out)["bad"]["status_code"] == 200


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = str(tmp_path_factory.mktemp("home"))
    environ = {"HOME": home, "PATH": "/usr/bin:/bin"}
    options = ("-o", "tokens_per_second=100", "-o", "slots=8")
    with serving(environ, "echo", *options) as (_, url):
        yield url


def begin(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [*PROGRAM, "batch", *arguments]
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError("it does not get that far")


def test_killed_and_begun_again(environ: dict[str, str], home: Path, url: str) -> None:
    """Issue 14.6: killed, then interrupted; each line is answered once, a torn one again."""
    requests, out = home / "in.jsonl", home / "out.jsonl"
    requests.write_text("".join(line(str(number)) for number in range(150)))
    arguments = (str(requests), "-o", str(out), "--url", url)
    with begin(environ, *arguments) as process:
        wait_for(out, 20, process)
        process.send_signal(signal.SIGSTOP)
        other = headrace(environ, "batch", *arguments)
        assert "Another run writes its answers" in other.stderr
        process.kill()
    with out.open("ab") as file:
        file.write(b'{"id":"batch_req_')
    with begin(environ, *arguments) as process:
        wait_for(out, 60, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "of 150 are answered. The same command goes on from there." in errors
    done = len(answers(out))
    assert 60 <= done < 150
    last = headrace(environ, "batch", *arguments)
    assert last.returncode == 0, last.stderr
    assert f"150 requests: {150 - done} answered; {done} before; " in last.stderr
    assert {*answers(out)} == {*map(str, range(150))}


def test_from_stdin_to_stdout(environ: dict[str, str], url: str) -> None:
    """Issue 14.6: without a name of its own, a file goes to the service that is configured."""
    done = headrace(environ | {"HEADRACE_URL": url}, "batch", "-", "-o", "-", stdin=line("a"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["custom_id"] == "a"
    assert "1 requests: 1 answered" in done.stderr


@pytest.mark.parametrize(
    ("requests", "before", "error", "code"),
    [
        (line("a") + "x\n" + line("a"), None, "in.jsonl is not sent: 2 faults", 2),
        ("", None, "in.jsonl has no requests.", 2),
        (line("a"), "notes of mine\n", "not a file of answers: line 1", 2),
        (line("a"), "notes of mine", "not a file of answers: line 1", 2),
        (line("a"), '{"id":"batch_req_1","custom_id":"b"}\n', "answers to other requests", 2),
    ],
)
@pytest.mark.usefixtures("as_environ")
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str],
    home: Path,
    requests: str,
    before: str | None,
    error: str,
    code: int,
) -> None:
    """Issue 14.6: before anything is sent, and the files stay as they are."""
    (home / "in.jsonl").write_text(requests)
    if before is not None:
        (home / "out.jsonl").write_text(before)
    assert run(["batch", "in.jsonl", "-o", "out.jsonl"]) == code
    assert error in capsys.readouterr().err
    if before is not None:
        assert (home / "out.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        (["in.jsonl", "-o", "in.jsonl"], "cannot take the answers", 2),
        (["in.jsonl", "-o", "-", "--json"], "--json prints the figures to stdout", 2),
        (["in.jsonl", "-o", "o", "--url", "x", "--local"], "flag --local", 2),
        (["none.jsonl", "-o", "o"], "No such file", 1),
        (["in.jsonl", "-o", "none/o"], "No such file", 1),
        (["in.jsonl", "-o", "o", "--url", "http://127.0.0.1:9"], "No service at", 1),
        (["in.jsonl", "-o", "o", "--local", "--model", "./none.gguf"], "none.gguf", 2),
    ],
)
@pytest.mark.usefixtures("as_environ")
def test_other_mistakes(
    capsys: pytest.CaptureFixture[str], home: Path, arguments: list[str], error: str, code: int
) -> None:
    (home / "in.jsonl").write_text(line("a"))
    assert run(["batch", *arguments]) == code
    assert error in capsys.readouterr().err
