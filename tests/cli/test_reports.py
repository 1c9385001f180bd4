"""`headrace usage` tells what was used, and `doctor` where it is kept."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tests.cli.programs import headrace

from headrace import machine
from headrace.cli.app import run
from headrace.core.install import install_command
from headrace.machine import facts
from headrace.telemetry.usage import Amounts, add


def today() -> date:
    """The day of the usage counters: UTC's."""
    return datetime.now(UTC).date()


TODAY = today()
"""The last day of the recorded usage; a day old when a run of the tests crosses midnight."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which two keys have used two models, on three days."""
    today = (TODAY - datetime(1970, 1, 1, tzinfo=UTC).date()).days
    used = {"requests": 2, "failed": 1, "prompt_tokens": 10, "completion_tokens": 20}
    add(
        tmp_path / "kept" / "usage.sqlite3",
        {
            (day, key, model, "chat", "live"): Amounts(**used, seconds=1.5, joules=joules)
            for day in (today, today - 1, today - 40)
            for key in ("-", "0123456789abcdef")
            for model, joules in (("small", 0.5), ("large", None))
        },
    )
    return tmp_path / "kept"


def test_a_table_with_a_total(environ: dict[str, str], home: Path) -> None:
    """By day and model if nothing is said; with a sum of all."""
    done = headrace(environ, "usage", "--home", str(home))
    heads, *rows = [line.split() for line in done.stdout.splitlines()]
    assert heads[:3] == ["DAY", "MODEL", "REQUESTS"]
    assert heads[-2:] == ["SECONDS", "JOULES"]
    assert len(rows) == 7
    assert rows[-2][:2] == [str(TODAY), "small"]
    assert rows[0][-2:] == ["3.0", "-"]
    assert rows[-1] == ["total", "24", "12", "0", "0", "120", "0", "240", "0", "18.0", "3.0"]


def test_json(environ: dict[str, str], home: Path) -> None:
    """Any groups in any order."""
    flags = ("usage", "--home", str(home), "--by", "key, model", "--since", "7d")
    before = today()
    found = json.loads(headrace(environ, *flags, "--json").stdout)
    assert found["by"] == ["key", "model"]
    assert found["since"] in {str(day - timedelta(6)) for day in (before, today())}
    assert found["total"]["requests"] == 16
    assert [(row["key"], row["model"], row["joules"]) for row in found["rows"]] == [
        ("-", "large", None),
        ("-", "small", 1.0),
        ("0123456789abcdef", "large", None),
        ("0123456789abcdef", "small", 1.0),
    ]


def test_what_is_asked_for_alone(environ: dict[str, str], home: Path) -> None:
    """A model, a key, days up to one."""
    last = str(TODAY - timedelta(2))
    flags = ("--model", "small", "--key", "-", "--until", last, "--by", "day")
    (row,) = json.loads(headrace(environ, "usage", "--json", "--home", str(home), *flags).stdout)[
        "rows"
    ]
    assert (row["day"], row["requests"]) == (str(TODAY - timedelta(40)), 2)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--by", "colour"), ("--by", ","), ("--since", "soon"), ("--since", "0d"), ("--until", "7.2")],
)
def test_a_wrong_flag_is_told(environ: dict[str, str], flag: str, value: str) -> None:
    done = headrace(environ, "usage", flag, value)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: flag {flag}: {value!r} is no")


def test_without_any(environ: dict[str, str]) -> None:
    """Nothing was served yet: nothing is made."""
    assert headrace(environ, "usage").stdout.splitlines()[-1].split()[:2] == ["total", "0"]
    assert not (Path(environ["HOME"]) / ".local").exists()


def test_doctor_tells_what_the_worker_told(environ: dict[str, str]) -> None:
    """W5: the system that the start of a worker carries, to the last version."""
    found = json.loads(headrace(environ, "doctor", "--json").stdout)
    info = msgspec.convert(found["system"], machine.SystemInfo)
    assert machine.attributes(info) == machine.attributes(machine.system())


def test_doctor_tells_what_is_kept_and_who_is_told(environ: dict[str, str], home: Path) -> None:
    """Traces and usage with their sizes, the address of the metrics, what switches OTLP on."""
    (home / "traces").mkdir()
    (home / "traces" / "requests.jsonl").write_text("x" * 100)
    flags = ("doctor", "--home", str(home))
    told = json.loads(headrace(environ, *flags, "--json").stdout)["telemetry"]
    size = (home / "usage.sqlite3").stat().st_size
    assert told == {
        "traces": {"on": True, "path": str(home / "traces"), "size": 100},
        "content": False,
        "usage": {"on": True, "path": str(home / "usage.sqlite3"), "size": size},
        "spans": None,
        "metrics": "http://127.0.0.1:11511/metrics",
    }
    changed = {
        **environ,
        "HEADRACE_TRACES": "false",
        "HEADRACE_METRICS_PORT": "9000",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
    }
    lines = headrace(changed, *flags).stdout.splitlines()
    assert f"traces   {home}/traces (off)" in lines
    assert "metrics  http://127.0.0.1:9000/metrics" in lines
    assert "spans    on, by OTEL_EXPORTER_OTLP_ENDPOINT" in lines


def test_doctor_tells_that_the_exporter_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """T2: variables that ask for what is not installed switch nothing on."""
    monkeypatch.setattr(facts, "_LIBRARIES", ())
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    assert run(["doctor", "--home", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    needs = f"but not installed: {install_command('otlp')}"
    assert f"spans    on, by OTEL_TRACES_EXPORTER, {needs}" in told
