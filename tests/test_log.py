from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.worker.rig import ask, echo, resolve, worker

from headrace.core.request import Message
from headrace.core.stream import collect
from headrace.log import JsonLines, LogSettings, TextLines, configure
from headrace.worker.process import WorkerProcess

SECRET = "the-secret-prompt"


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    """The logging of the tests themselves is as it was."""
    root, ours = logging.root, logging.getLogger("headrace")
    kept = root.handlers[:], root.level, ours.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = kept[0], kept[3]
    root.setLevel(kept[1])
    ours.setLevel(kept[2])


def record(**fields: Any) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "headrace.x", "levelname": "INFO", "msg": "it %s", "args": ("happened",)}
    )
    vars(made).update(fields)
    return made


def test_a_line_of_json_for_each_record() -> None:
    """W27: structured; the data of a record are keys."""
    line = JsonLines().format(record(created=0.0, msecs=7.0, data={"n": 1, "path": Path("/x")}))
    assert msgspec.json.decode(line) == {
        "time": "1970-01-01T00:00:00.007Z",
        "level": "info",
        "logger": "headrace.x",
        "message": "it happened",
        "n": 1,
        "path": "/x",
    }
    assert "\n" not in JsonLines().format(record(data={"text": "two\nlines"}))


def test_a_line_of_text_for_each_record() -> None:
    """W27: the same for eyes; data as key=value on one line."""
    line = TextLines().format(record(data={"n": 1, "why": "two\nlines"}))
    assert line == 'info    headrace.x: it happened n=1 why="two\\nlines"'


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_a_traceback_is_kept(formatter: logging.Formatter) -> None:
    try:
        raise KeyError("gone")
    except KeyError:
        line = formatter.format(record(exc_info=sys.exc_info()))
    assert "KeyError" in line
    assert "test_a_traceback_is_kept" in line


def test_levels_are_ours_and_libraries_stay_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """W27: to stderr; other libraries from warning on."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    configure("debug", "text")
    configure("debug", "text")
    logging.getLogger("headrace.x").debug("ours")
    logging.getLogger("other").info("theirs")
    logging.getLogger("other").warning("loud")
    assert out.getvalue().splitlines() == ["debug   headrace.x: ours", "warning other: loud"]


def test_a_terminal_that_has_gone_fails_nothing() -> None:
    """W27: a closed stderr, and one whose reader is dead, cost no request."""
    program = """
import asyncio, os, sys
from headrace.log import LogSettings, configure
from headrace.core.stream import collect
from tests.worker.rig import ask, process, worker
async def main():
    async with worker() as one:
        assert (await collect(one.ask(ask("ok")))).text == "ok"
    async with process() as one:
        one._log_settings = LogSettings(level="debug", style="json")
        assert (await collect(one.ask(ask("ok")))).text == "ok"
configure("debug", "json")
if sys.argv[1] == "closed":
    sys.stderr.close()
else:
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
asyncio.run(main())
print("fine", flush=True)
os._exit(0)
"""
    for how in ("closed", "broken"):
        ended = subprocess.run(
            [sys.executable, "-c", program, how], check=False, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (0, "fine\n"), ended.stderr


async def test_no_prompt_and_no_answer_is_ever_logged(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W27: at debug level, well or failing, in this process and in a child."""
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)
    configure("debug", "json")
    messages = (Message("user", SECRET),)
    asked = (ask(SECRET), ask(None, messages=messages), ask(SECRET, stop=("-prompt",)))
    for options in ({}, {"fail_after": 3}):
        async with worker(**options) as one:
            await asyncio.gather(
                *(collect(one.ask(each)) for each in asked), return_exceptions=True
            )
        process = WorkerProcess(echo(**options), resolve, log_settings=LogSettings(level="debug"))
        await process.start()
        await asyncio.gather(
            *(collect(process.ask(each)) for each in asked), return_exceptions=True
        )
        await process.aclose()
    logged = capfd.readouterr().err
    assert logged.count("headrace.request") == 12
    assert SECRET not in logged
    assert "secret" not in logged


async def test_prompts_and_answers_are_logged_when_switched_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """W27: only then, and in the record of the request."""
    settings = LogSettings(level="info", style="json", content=True)
    process = WorkerProcess(echo(text="answer"), resolve, log_settings=settings)
    await process.start()
    await collect(process.ask(ask(SECRET)))
    await process.aclose()
    lines = [msgspec.json.decode(line) for line in capfd.readouterr().err.splitlines()]
    (shown,) = [line for line in lines if line["message"] == "headrace.request"]
    assert (shown["asked"], shown["answered"]) == (SECRET, "answer")


async def test_a_start_is_logged_with_what_it_runs_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """W5: model, engine, source, parameters and system information."""
    configure("info", "json")
    async with worker(slots=3, chat_template="{{ messages[0].content }} hidden") as one:
        await collect(one.ask(ask("x")))
    lines = [msgspec.json.decode(line) for line in capfd.readouterr().err.splitlines()]
    start = lines[0]
    assert start["message"] == "headrace.worker.start"
    assert (start["model"], start["engine"], start["source"]) == ("echo", "echo", "builtin:echo")
    assert start["parameters"]["options"] == {"slots": 3}
    assert start["system"]["cpu"]
    assert start["system"]["devices"]
    assert start["system"]["libraries"]
    assert lines[1]["message"] == "headrace.worker.ready"
    assert lines[1]["load_ms"] >= 0
    figures = lines[2]
    assert figures["message"] == "headrace.request"
    assert (figures["completion_tokens"], figures["outcome"]) == (2, "stop")
