from __future__ import annotations

import asyncio
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from tests.worker.rig import ask, echo, resolve, worker

import headrace
from headrace.core.request import Message
from headrace.core.status import EventKind
from headrace.core.stream import collect
from headrace.log import (
    _FOR_MACHINES,
    _SENTENCES,
    JsonLines,
    LogSettings,
    TextLines,
    configure,
)
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
        {
            "name": "headrace.x",
            "levelname": "INFO",
            "levelno": 20,
            "msg": "it %s",
            "args": ("happened",),
        }
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


def text(message: str, level: int = logging.INFO, **fields: Any) -> str:
    """The line for people, without its time."""
    made = logging.LogRecord("headrace.x", level, "", 0, message, (), None)
    vars(made).update(fields)
    clock, _, line = TextLines().format(made).partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock)
    return line


CALL = {"method": "POST", "route": "/v1/chat/completions", "status": 200, "outcome": "ok"}
LOADED = {"model": "smollm2", "ms": 1000, "memory": {"cpu": 564 * 10**6}, "engine": "llamacpp"}
SPENT = {"model": "smollm2", "prompt": 31, "completion": 8, "speed": 53.2}


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("pool.ready", LOADED, "smollm2 ready (llamacpp, 564.0 MB, 1.0 s)"),
        (
            "pool.loading",
            {"model": "m", "need": {"cuda:0": 2 * 10**9}, "how": "estimated"},
            "m loading (about 2.0 GB cuda:0)",
        ),
        ("pool.loading", {"model": "m", "need": {}, "how": "measured"}, "m loading"),
        ("pool.draining", {"model": "", "running": 0, "drain_s": 30.0}, "Stopping"),
        (
            "pool.draining",
            {"model": "", "running": 1, "drain_s": 30.0},
            "Stopping: 1 answer, up to 30 s; Ctrl-C again to cut",
        ),
        (
            "pool.updated",
            {"model": "m", "changes": {"keep_alive": 5, "options.slots": None}},
            "m changed: keep_alive=5, options.slots=default",
        ),
        ("pool.updated", {"model": "m", "changes": {"pinned": True}}, "m changed: pinned=true"),
        ("service.ready", {}, "Ready"),
    ],
)
def test_a_sentence_for_people(name: str, data: dict[str, Any], line: str) -> None:
    """Issue 12.28, W27: what happened to which model, sizes and times to read."""
    assert text(f"headrace.{name}", data=data) == line


def test_a_request_is_one_line_with_its_figures() -> None:
    """Issue 12.28: method, route, status, model, tokens, time and speed; or what was wrong."""
    call = {**CALL, "ms": 330.0}
    line = "POST /v1/chat/completions 200 smollm2 31+8 tokens 0.33 s 53 tok/s"
    assert text("headrace.access", data=call, more=SPENT) == line
    failed = {**call, "status": 404}
    more = {"problem": "There is no x.\nGET / 200"}
    line = "POST /v1/chat/completions 404 0.33 s There is no x. GET / 200"
    assert text("headrace.access", data=failed, more=more) == line


def test_every_record_of_the_service_has_a_sentence_or_is_for_machines() -> None:
    """Issue 12.28: no line for people has the name of a record."""
    sources = Path(headrace.__file__).parent.rglob("*.py")
    called = re.compile(r'\.(?:info|warning|error|exception)\(\s*"headrace\.([\w.]+)"')
    names = {name for source in sources for name in called.findall(source.read_text())}
    kinds = {f"pool.{kind}" for kind in get_args(EventKind)}
    assert len(names) > 10
    assert {f"headrace.{name}" for name in (names | kinds) - set(_SENTENCES)} <= _FOR_MACHINES


def test_what_only_machines_read_is_left_out_unless_everything_is_wanted() -> None:
    """Issue 12.28: a start's 1.5 kB, and requests that are repeated each second."""
    health = {**CALL, "method": "GET", "route": "/health/live"}
    hidden = [
        record(msg="headrace.worker.start", args=()),
        record(msg="headrace.access", args=(), data=health),
    ]
    assert not any(map(TextLines().filter, hidden))
    assert all(map(TextLines(full=True).filter, hidden))
    metrics = {**CALL, "method": "GET", "route": "/metrics"}
    assert not TextLines().filter(record(msg="headrace.access", args=(), data=metrics))
    refused = record(msg="headrace.access", args=(), data={**metrics, "status": 401})
    assert TextLines().filter(refused)


def test_colours_of_a_terminal() -> None:
    """Issue 12.28: failures are seen at a glance."""
    lines = TextLines(colour=True)
    failed = record(msg="headrace.access", args=(), data={**CALL, "status": 503, "ms": 1.0})
    assert re.fullmatch(r"\x1b\[2m\S+\x1b\[0m \x1b\[31mPOST .*\x1b\[0m", lines.format(failed))
    assert lines.format(record(msg="a\x1b%s b")).count("\x1b") == 2, "only our own colours"


def test_other_records_are_text_with_pairs() -> None:
    """W27: data as key=value on one line; a library is named."""
    assert text("it happened", data={"n": 1, "why": "a\nb"}) == 'it happened n=1 why="a\\nb"'
    assert text("late", logging.WARNING) == "warning: late"


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
    lines = [line.partition(" ")[2] for line in out.getvalue().splitlines()]
    assert lines == ["debug: ours", "warning: other: loud"]


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


def test_the_library_prints_nothing_of_its_own_accord() -> None:
    """Issue 12.28: a program that has set up no logging would get the bare names of records."""
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("headrace").handlers)
