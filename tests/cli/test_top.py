"""`headrace top`: its frames, and the program on a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cli.programs import PROGRAM
from tests.cli.stub import stub
from wcwidth import wcswidth

from headrace.cli.app import run
from headrace.cli.top_frame import Snapshot, Sort, lines, sparkline
from headrace.core.record import Activity, Rates, RunningRequest
from headrace.core.status import DeviceStatus, Footprint, ModelStatus, PoolStatus, ReplicaStatus

MB = 1_000_000
NOW = 1_700_000_000.0
URL = "http://127.0.0.1:8000"
SMALL = ModelStatus(
    id="small",
    source="s",
    state="ready",
    memory={"cpu": 150 * MB},
    estimated=Footprint(devices={"cpu": 160 * MB}),
    running=2,
    max_running=8,
    queued=3,
)
ASLEEP = ModelStatus(id="asleep", source="s", state="stopped")
LOADING = ModelStatus(
    id="日本語の大きいモデル" * 3, source="x", state="loading", progress="downloading", done=30,
    total=120,
)  # fmt: skip
EVIL = ModelStatus(id="\x1b[2J\x9b1mevil\r\nname\u202e\u200b\tx", source="x", state="failed")
DEVICES = (
    DeviceStatus(name="cpu", total=9000 * MB, budget=8000 * MB, booked=6000 * MB, free=500 * MB),
    DeviceStatus(name="cuda:0", total=9000 * MB, budget=0, booked=0, free=0),
)
RATES = Rates(
    model="small",
    window_s=60,
    requests=45,
    failed=2,
    prompt_tokens_per_second=1234.5,
    completion_tokens_per_second=123.4,
    time_to_first_token_p50_ms=120.2,
    time_to_first_token_p99_ms=2120.2,
    time_per_output_token_p50_ms=8.21,
)


def request(number: int, **fields: Any) -> RunningRequest:
    """The number is also how many times 10 s it has run for."""
    return RunningRequest(
        id=f"{number:024x}",
        operation="chat",
        since=NOW - 10 * number,
        **{"model": "small", "client": "abcdef0123456789", "phase": "decode", **fields},
    )


FAST = request(2, time_to_first_token_ms=10_000.0, completion_tokens=400)
WAITING = request(1, phase="queued", model="loud\x07name")
OLD = request(9, model="asleep", time_to_first_token_ms=95_000.0, completion_tokens=1)
STATUS = PoolStatus(models=(ASLEEP, LOADING, EVIL, SMALL), devices=DEVICES)
ACTIVITY = Activity(running=(OLD, FAST, WAITING), rates=(RATES,))
SNAPSHOT = Snapshot(time=NOW, status=STATUS, activity=ACTIVITY)


def drawn(
    seen: Snapshot = SNAPSHOT, width: int = 160, height: int | None = None, sort: Sort = "slowest"
) -> list[str]:
    frame = lines(seen, URL, width, height, sort=sort)
    return ["".join(text for text, _ in line).rstrip() for line in frame]


def cells(frame: list[str], begin: str) -> list[str]:
    return re.split(r"  +", next(line for line in frame if line.startswith(begin)).strip())


def test_what_a_frame_tells() -> None:
    """T: models, queues, tokens/s, latencies, memory, and the slowest requests first."""
    frame = drawn()
    assert frame[0] == f"headrace top  {URL}"
    assert cells(frame, "123 tokens") == ["123 tokens/s out", "1234 in", "2 running", "3 queued",
        "45 requests and 2 errors in a minute"]  # fmt: skip
    assert cells(frame, "cpu") == ["cpu", "█" * 15 + "░" * 5, "6.0 GB", "8.0 GB", "500.0 MB"]
    assert cells(frame, "cuda:0")[1] == "░" * 20
    assert cells(frame, "small") == [
        "small", "ready", "2/8", "3", "123", "1234", "120ms", "2.12s", "8.2ms",
        "150.0 MB of ~160.0 MB",
    ]  # fmt: skip
    assert cells(frame, "asleep") == ["asleep", "not loaded", "0/-", "0", *["-"] * 6]
    assert cells(frame, "日本")[1] == "loading 25%"
    assert cells(frame, FAST.id) == [
        FAST.id, "small", "abcdef0123456789", "decode", "20s", "10.00s", "400", "40",
    ]  # fmt: skip
    assert cells(frame, OLD.id)[4:] == ["1m30s", "1m35s", "1", "-"], "its clock is another"
    assert cells(frame, WAITING.id)[3:] == ["queued", "10s", "-", "0", "-"]


def test_the_estimate_is_of_all_loaded_replicas() -> None:
    """Issue 12.32: the memory of two is not compared with the estimate of one."""
    replicas = [
        ReplicaStatus(number=n, state="ready" if n < 2 else "stopped", memory=memory)
        for n, memory in enumerate(({"cpu": 75 * MB}, {"cpu": 75 * MB}, {}))
    ]
    model = msgspec.structs.replace(
        SMALL, replicas=tuple(replicas), estimated=Footprint(devices={"cpu": 80 * MB})
    )
    status = PoolStatus(models=(model,), devices=())
    frame = drawn(Snapshot(time=NOW, status=status, activity=ACTIVITY))
    assert cells(frame, "small")[-1] == "150.0 MB of ~160.0 MB"


def test_the_order_of_rows() -> None:
    """What is loaded comes first; requests by age, or by model."""
    frame = drawn()
    first = [line.split(" ")[0] for line in frame]
    assert first.index("small") < first.index("asleep")
    ids = [word for word in first if len(word) == 24]
    assert ids == [OLD.id, FAST.id, WAITING.id]
    by_model = [line.split(" ")[0] for line in drawn(sort="model")]
    assert [word for word in by_model if len(word) == 24] == [OLD.id, WAITING.id, FAST.id]


@pytest.mark.parametrize("height", [None, 50, 24, 12, 5, 1])
@pytest.mark.parametrize("width", [160, 80, 40, 20, 7, 1])
def test_no_frame_is_larger_than_the_terminal(width: int, height: int | None) -> None:
    """Names are as long, as wide and as bad as they like."""
    many = [request(number, model="日本語" * 9) for number in range(60)]
    noted = Snapshot(
        time=NOW,
        status=STATUS,
        activity=Activity(running=(*ACTIVITY.running, *many), rates=(RATES,)),
        error="no answer since 5s, trying again. " + "x" * 200,
    )
    frame = drawn(noted, width, height)
    assert frame
    if height is not None:
        assert len(frame) <= height
    assert [line for line in frame if not 0 <= wcswidth(line) <= width] == []


def test_what_remains_on_a_narrow_terminal() -> None:
    """At 80 columns ids are whole, at 40 the names and what matters most are there."""
    at_80, at_40 = drawn(width=80), drawn(width=40)
    assert cells(at_80, FAST.id)[0] == FAST.id
    assert "150.0 MB of ~160.0 MB" in "\n".join(at_80)
    assert cells(at_40, "MODEL") == ["MODEL", "STATE", "RUN", "QUEUE", "OUT/S"]
    assert cells(at_40, FAST.id) == [FAST.id, "decode", "20s"]


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([0, 50, 100], 80, "▁▅█"),
        ([0, 0], 80, "▁▁"),
        ([100, 1, 2, 4], 3, "▃▅█"),
        ([7], 80, ""),
        ([], 80, ""),
        ([1, 2], 0, ""),
    ],
)
def test_the_history_is_a_line_of_bars(values: list[float], width: int, bars: str) -> None:
    """Issue 16.5: from zero to the largest, the latest last, no wider than the terminal."""
    assert sparkline(values, width) == bars


def test_the_history_is_below_the_totals_and_coloured() -> None:
    """Issue 16.5: sparklines and colours, on a terminal only: `--once` has no history."""
    seen = Snapshot(time=5.0, status=PoolStatus(models=(), devices=()), activity=Activity())
    with_history = lines(seen, URL, 60, history=[1, 2, 3])
    without = lines(seen, URL, 60)
    added = [line for line in with_history if line not in without]
    assert added == [[("▃▆█", "cyan")]]
    assert len(with_history) == len(without) + 1


def test_names_cannot_command_the_terminal() -> None:
    frame = "\n".join(drawn())
    assert [one for one in frame if not (one.isprintable() or one == "\n")] == []
    assert "[2J1mevil name x" in frame
    assert "loudname" in frame


def test_what_does_not_fit_is_counted() -> None:
    busy = Activity(running=tuple(request(number) for number in range(30, 0, -1)))
    models = tuple(ModelStatus(id=f"m{n}", source="s", state="ready") for n in range(40))
    full = Snapshot(time=NOW, status=PoolStatus(models=models, devices=DEVICES), activity=busy)
    frame = drawn(full, 100, 30)
    assert len(frame) == 30
    hidden = [int(line.split()[1]) for line in frame if line.startswith("... ")]
    shown = sum(line.startswith(("m", "0000")) for line in frame)
    assert len(hidden) == 2
    assert sum(hidden) + shown == 40 + 30


def test_a_service_that_does_not_observe() -> None:
    frame = drawn(Snapshot(time=NOW, status=STATUS))
    assert frame[-1] == "This service does not report its requests."
    assert cells(frame, "small")[4:] == ["-"] * 5 + ["150.0 MB of ~160.0 MB"]


ANSWERS: dict[str, tuple[int, Any]] = {
    "/admin/models": (200, STATUS),
    "/admin/activity": (200, ACTIVITY),
}


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One plain frame, or one JSON document; the width is that of COLUMNS."""
    with stub(ANSWERS) as service:
        for arguments in ([], ["--once"], ["--sort", "model"]):
            assert run(["top", *arguments, "--url", service.url]) == 0
            shown = capsys.readouterr().out
            assert shown.startswith(f"headrace top  {service.url}\n123 tokens/s out")
            assert "\x1b" not in shown
            assert max(map(len, shown.splitlines())) > 80
        assert run(["top", "--once", "--json", "--url", service.url]) == 0
        document = json.loads(capsys.readouterr().out)
    assert document["error"] is None
    assert document["activity"]["rates"][0]["requests"] == 45
    assert [one["id"] for one in document["status"]["models"]][-1] == "small"


def test_what_is_refused(capsys: pytest.CaptureFixture[str], free_port: Any) -> None:
    unseen = {"error": {"message": "Not observed.", "code": "unsupported_parameter"}}
    with stub({**ANSWERS, "/admin/activity": (400, unseen)}) as service:
        assert run(["top", "--url", service.url]) == 0
        assert "does not report its requests" in capsys.readouterr().out
        service.answers["/admin/models"] = (401, {"error": {"message": "Who?", "code": None}})
        assert run(["top", "--url", service.url]) == 2
        assert "HEADRACE_ADMIN_KEY" in capsys.readouterr().err
    for interval in ("0", "fast", "2h", "-1"):
        assert run(["top", "--interval", interval, "--url", URL]) == 2
        assert "no time from 100ms to 1h" in capsys.readouterr().err
    assert run(["top", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "No service at" in capsys.readouterr().err


def test_json_each_time(environ: dict[str, str], tmp_path: Path) -> None:
    """A document in each line, also of the time when the service was not there."""
    with contextlib.ExitStack() as serving:
        service = serving.enter_context(stub(ANSWERS))
        command = [*PROGRAM, "top", "--json", "--interval", "100ms", "--url", service.url]
        with subprocess.Popen(
            command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            try:
                first, _ = (json.loads(program.stdout.readline()) for _ in range(2))
                assert (first["error"], len(first["activity"]["running"])) == (None, 3)
                serving.close()
                told = (json.loads(line) for line in program.stdout)
                gone = next(one for one in told if one["error"])
                assert (gone["status"], gone["activity"]) == (None, None)
                port = int(service.url.rpartition(":")[2])
                serving.enter_context(stub(ANSWERS, port))
                assert next(one for one in told if not one["error"])["status"]
            finally:
                program.kill()


class Screen:
    """The program on a terminal, and what it has written to it."""

    def __init__(self, program: subprocess.Popen[bytes], terminal: int, shell: int) -> None:
        self.program = program
        self.written = ""
        self._terminal = terminal
        self._shell = shell
        self._before = termios.tcgetattr(shell)

    def until(self, text: str) -> str:
        """Wait until it is written, and return what was written before it, text included."""
        deadline = time.monotonic() + 20
        while text not in self.written:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} never came: {self.written[-3000:]!r}"
            if select.select([self._terminal], [], [], left)[0]:
                self.written += os.read(self._terminal, 65536).decode(errors="replace")
        seen, _, self.written = self.written.partition(text)
        return seen + text

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._shell, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._shell)[3] & termios.ECHO

    def left(self) -> int:
        """Return the exit code; the terminal has to be as it was."""
        # The other screen is left, and the cursor is to be seen again.
        seen = self.until("\x1b[?1049l")
        if "\x1b[?25h" not in seen:
            self.until("\x1b[?25h")
        code = self.program.wait(20)
        assert termios.tcgetattr(self._shell) == self._before
        return code


@contextlib.contextmanager
def screen(
    environ: dict[str, str],
    *arguments: str,
    program: tuple[str, ...] = PROGRAM,
    begin: tuple[str, ...] = ("top", "--interval", "200ms"),
    **variables: str,
) -> Iterator[Screen]:
    terminal, shell = pty.openpty()
    fcntl.ioctl(shell, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    wanted = {**environ, "TERM": "xterm-256color", **variables}
    for unwanted in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        if unwanted not in variables:
            wanted.pop(unwanted, None)
    command = [*program, *begin, *arguments]
    try:
        with subprocess.Popen(
            command, env=wanted, cwd=environ["HOME"], stdin=shell, stdout=shell, stderr=shell,
            start_new_session=True,
        ) as started:  # fmt: skip
            try:
                yield Screen(started, terminal, shell)
            finally:
                started.kill()
    finally:
        os.close(terminal)
        os.close(shell)


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


def test_on_a_terminal(environ: dict[str, str]) -> None:
    """It follows the service and the size of the terminal, says when nobody answers, and `q`
    leaves everything as it was."""
    with contextlib.ExitStack() as serving:
        service = serving.enter_context(stub(dict(ANSWERS)))
        with screen(environ, "--url", service.url) as shown:
            begin = shown.until("150.0 MB of ~160.0 MB")
            assert "\x1b[?1049h" in begin
            assert COLOUR.search(begin)
            assert shown.is_raw
            service.answers["/admin/activity"] = (200, Activity(running=(WAITING,)))
            shown.until("0 tokens/s out")
            shown.resize(24, 40)
            shown.program.send_signal(signal.SIGWINCH)
            narrow = shown.until("OUT/S")
            assert "P99" not in narrow.rpartition("headrace top")[2]
            serving.close()
            shown.until("no answer since ")
            shown.until(" 1s, trying again")
            port = int(service.url.rpartition(":")[2])
            serving.enter_context(stub(ANSWERS, port))
            shown.until("123 tokens/s out")
            last = shown.until("OUT/S")
            assert "no answer" not in last
            shown.press(b"xq")
            assert shown.left() == 0


@pytest.mark.parametrize(
    ("way", "code"), [("ctrl-c", 0), ("interrupt", 0), ("terminate", 143)], ids=str
)
def test_other_ways_out(way: str, code: int, environ: dict[str, str]) -> None:
    """Ctrl-C by key and by signal, and SIGTERM; without colour where that is asked for."""
    with stub(ANSWERS) as service, screen(environ, "--url", service.url, NO_COLOR="1") as shown:
        begin = shown.until("150.0 MB of ~160.0 MB")
        assert not COLOUR.search(begin)
        if way == "ctrl-c":
            shown.press(b"\x03")
        else:
            number = signal.SIGINT if way == "interrupt" else signal.SIGTERM
            shown.program.send_signal(number)
        assert shown.left() == code


def test_a_service_that_says_nothing_any_more(environ: dict[str, str]) -> None:
    """A frozen service is told of before the look at it has been given up."""
    with stub(ANSWERS) as service, screen(environ, "--url", service.url) as shown:
        shown.until("123 tokens/s out")
        service.awake.clear()
        try:
            shown.until("no answer since ")
        finally:
            service.awake.set()
        shown.until("123 tokens/s out")
        shown.press(b"q")
        assert shown.left() == 0


BROKEN = """
from headrace.cli import main, top
whole, drawn = top.lines, []
def lines(*given, **named):
    drawn.append(1)
    if len(drawn) > 3:
        raise RuntimeError("it broke")
    return whole(*given, **named)
top.lines = lines
main()
"""


def test_a_fault_leaves_the_terminal_as_it_was(environ: dict[str, str]) -> None:
    """What is wrong is then to be read on the screen that was there before."""
    program = (*PROGRAM[:2], BROKEN)
    with stub(ANSWERS) as service, screen(environ, "--url", service.url, program=program) as shown:
        shown.until("123 tokens/s out")
        assert shown.left() == 1
        shown.until("error: unexpected RuntimeError: it broke")
