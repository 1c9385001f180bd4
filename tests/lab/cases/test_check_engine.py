"""`headrace check-engine`: what it prints, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.lab.cases.test_markov import CODE, install

from headrace.cli.app import run

ECHO = ["check-engine", "echo", "--model", "builtin:echo", "--backend", "worker"]


def test_a_line_for_each_case(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 4: name, rows and result, and a summary."""
    assert run([*ECHO, "--only", "*to[pk]*"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    told = [(line.split()[1], line.split()[2]) for line in lines]
    assert ("ok", "stop_strings") in told
    assert ("refused", "sampling_top_p") in told
    assert summary.startswith(f"{len(lines)} cases: ")


def test_a_failure_is_told_and_is_the_exit_code(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 4: the case, and what was seen of it."""
    install(
        "wrong",
        CODE.replace("completion_tokens=made", "completion_tokens=0"),
        tmp_path,
        monkeypatch,
    )
    command = ["check-engine", "wrong", "--model", "builtin:echo", "--backend", "worker"]
    assert run([*command, "--only", "usage_*"]) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert "FAILED    usage_is_exact" in line
    assert "Usage has 0 tokens" in line
    assert summary == "1 cases: 0 ok, 0 refused, 0 reported, 1 failed"
    assert run([*command, "--only", "usage_*", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["case"], found["result"]) == (
        "worker",
        "usage_is_exact",
        "failed",
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--backend", "cloud"], "worker, process, pool, all"),
        (["--only", "nothing"], "no case is called nothing"),
        (["--option", "no_such=1"], "no_such"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ECHO, *flags]) == 2
    assert says in capsys.readouterr().err
