"""`headrace bench` as it is used, against services of its own and others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.cli.programs import PROGRAM, serving
from tests.cli.stub import Stub, stub

from headrace.cli.app import run

PACED = ("-o", "tokens_per_second=200", "-o", "prefill_tokens_per_second=1000")
METER = "meter"
SHORT = ("--prompt-tokens", "40", "--output-tokens", "20")
END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


@pytest.fixture(autouse=True)
def _environ(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, environ[name])


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    told = {"HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": ""}
    return {**kept, **told, "HEADRACE_METRICS_KEYS": METER}


class Bench:
    """Runs the command in this process; a server of its own is still another."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def says(self, *arguments: str) -> tuple[int, str, str]:
        code = run(["bench", *arguments])
        out, err = self._capsys.readouterr()
        return code, out, err

    def __call__(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.says(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(capsys)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    home = {"HOME": str(tmp_path_factory.mktemp("home")), "XDG_DATA_HOME": ""}
    # Nobody reads what it writes.
    home["HEADRACE_LOG_LEVEL"] = "warning"
    with serving(kept | home, "echo", *PACED) as (_, url):
        yield url


def test_a_sweep_of_its_own_server(bench: Bench, tmp_path: Path) -> None:
    record, plot = tmp_path / "a.json", tmp_path / "a.svg"
    code, out, err = bench.says(
        *("echo", *PACED, *SHORT, "--concurrency", "1,4", "--requests", "8"),
        *("--slo", "ttft=10s", "--output", str(record), "--plot", str(plot), "--raw"),
    )
    assert code == 0, err
    assert out.splitlines()[1].startswith("LOAD  OK  FAILED  REQ/S  TOKENS/S")
    told = json.loads(record.read_text())
    assert told["own_server"]
    assert told["machine"]["cpu"]
    one, four = told["levels"]
    for level in (one, four):
        assert (level["sent"], level["ok"], level["failed"]) == (8, 8, 0)
        assert (level["prompt_tokens"], level["completion_tokens"]) == (40, 20)
        assert level["counted_by"] == "usage"
        assert level["goodput"] == 1
        # 40 tokens of prompt take 40 ms, each of the answer 5 ms; nothing can be faster. A first
        # token that comes late makes the gaps shorter, but not both together.
        assert level["ttft_ms"]["p50"] >= 40
        for row in level["rows"]:
            assert row["ttft_ms"] + 19 * row["inter_token_ms"] >= 130
        assert level["ttft_ms"]["p50"] >= level["server"]["time_to_first_token_ms"]["p50"]
        assert len(level["rows"]) == 8
        assert len(level["rows"][0]["gaps_ms"]) == 19
        assert "of_limit" in level
    assert four["output_tokens_per_s"] > 2 * one["output_tokens_per_s"]
    assert 3 < four["running"] <= 4.01
    assert plot.read_text().count("<path") > 4
    code, out, err = bench.says("compare", str(record), str(record), "--plot", "b.png")
    assert code == 0, err
    assert "(1.00)" in out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_open_loop_of_a_service(bench: Bench, service: str) -> None:
    where = ("--url", f"{service}/v1", *SHORT, "--api", "completions")
    found = bench(*where, "--rate", "20,40", "--duration", "0.5s", "--arrival", "constant")
    assert found["settings"]["model"] == "echo"
    assert [level["ok"] for level in found["levels"]] == [10, 20]
    for level in found["levels"]:
        assert level["late_ms"]["p50"] < 1000
        assert level["failed"] == 0
        assert level["of_limit"] is None


def test_waiting_for_a_busy_server_counts_in_an_open_loop(bench: Bench) -> None:
    # One at a time, 100 ms each: of 10 that come at once the last waits for nine.
    pace = ("-o", "slots=1", "-o", "tokens_per_second=200")
    load = ("--rate", "1000", "--requests", "10", *SHORT, "--warm-up", "0")
    level = bench("echo", *pace, *load)["levels"][0]
    assert level["ok"] == 10
    assert level["ttft_ms"]["max"] >= 800


def test_prompts_of_a_file_and_a_limit(bench: Bench, service: str, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("abc\n")
    told = ("--model-bytes", "1MB", "--bandwidth", "1GB/s")
    where = ("--url", service, "--prompts", str(file), "--output-tokens", "3")
    found = bench(*where, *told, "--concurrency", "1", "--requests", "3")
    level = found["levels"][0]
    assert level["prompt_tokens"] == 3
    assert level["of_limit"] == pytest.approx(level["output_tokens_per_s"] / 1000)


def test_ctrl_c_keeps_what_was_measured_and_ends_its_server(
    environ: dict[str, str], tmp_path: Path
) -> None:
    record = tmp_path / "a.json"
    flags = ("echo", *PACED, *SHORT, "--concurrency", "2", "--duration", "60s")
    command = [*PROGRAM, "bench", *flags, "--output", str(record)]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        try:
            children = _wait_for_answers(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert b"TOKENS/S" in out
    told = json.loads(record.read_text())
    assert told["interrupted"]
    assert told["levels"][0]["ok"] > 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def _wait_for_answers(pid: int) -> list[psutil.Process]:
    """Wait until its own server has answered more than the probe, the warm-up and what runs."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(psutil.Error, OSError):
            children = psutil.Process(pid).children(recursive=True)
            if _answered(children) >= 8:
                return children
        time.sleep(0.05)
    raise AssertionError("it never began")


def _answered(processes: list[psutil.Process]) -> float:
    """How many answers the one that listens has given, as its metrics tell."""
    for one in processes:
        for port in [at.laddr.port for at in one.net_connections() if at.status == "LISTEN"]:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {METER}"}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                found = re.search(
                    r'_http_requests_total{.*chat.*"2xx"} (\S+)', answer.read().decode()
                )
            return float(found[1]) if found else 0
    return 0


def test_its_server_ends_when_it_is_killed(environ: dict[str, str], tmp_path: Path) -> None:
    command = [*PROGRAM, "bench", "echo", *PACED, *SHORT, "--duration", "60s"]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        try:
            children = _wait_for_answers(process.pid)
        finally:
            process.kill()
    assert len(children) > 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def other(answer: tuple[int, Any]) -> contextlib.AbstractContextManager[Stub]:
    """A service without /tokenize."""
    models = {"data": [{"id": "m"}]}
    routes = {"/v1/chat/completions": answer, "/tokenize": (404, {}), "/v1/models": (200, models)}
    return stub(routes)


ONCE = ("--concurrency", "2", "--requests", "4", "--warm-up", "0", "--prompt-tokens", "5")


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_what_is_not_counted_warms_no_cache(bench: Bench, tmp_path: Path, form: str) -> None:
    """Each prompt of a file is asked once, and nothing before begins as one of them."""
    own, system = ["one two three", "four five six"], {"role": "system", "content": "be kind"}
    file = tmp_path / f"p.{form}"
    chats = [{"messages": [system, {"role": "user", "content": text}]} for text in own]
    file.write_text("\n".join(own if form == "txt" else map(json.dumps, chats)))
    load = ("--concurrency", "1", "--requests", "2", "--warm-up", "2", "--prompts", str(file))
    with other((200, TEXT * 3 + END)) as told:
        bench("--url", told.url, "--output-tokens", "3", *load)
        bodies = [body for _, path, body, _ in told.asked if path.endswith("completions")]
    said = [body["messages"][-1]["content"] for body in bodies]
    assert said == ["three two one", "six five four", "three two one", *own]
    if form == "jsonl":
        assert all(body["messages"][0] == system for body in bodies)


def test_a_service_that_tells_neither_usage_nor_tokens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with other((200, TEXT * 3 + END)) as told:
        found = bench("--url", told.url, *ONCE)
        bodies = [body for _, path, body, _ in told.asked if path.endswith("completions")]
        assert told.asked[-1][3] == "Bearer k"
    level = found["levels"][0]
    assert (level["ok"], level["counted_by"], level["completion_tokens"]) == (4, "chunks", 3)
    assert level["prompt_tokens"] is level["total_tokens_per_s"] is None
    assert found["prompts"] == "synthetic, length estimated"
    assert any("no usage" in note for note in found["notes"])
    assert len(bodies[0]["messages"][0]["content"].split()) == 5
    assert bodies[0]["ignore_eos"]
    assert bodies[0]["stream_options"] == {"include_usage": True}


def test_a_service_that_refuses_what_it_does_not_know(bench: Bench) -> None:
    with other((200, TEXT + END)) as told:
        picky = _Picky(told.answers, "/v1/chat/completions")
        told.answers = picky
        found = bench("--url", told.url, *ONCE)
    assert found["levels"][0]["ok"] == 4
    assert any("ignore_eos" in note for note in found["notes"])


class _Picky(dict[str, tuple[int, Any]]):
    """Refuses the first request."""

    def __init__(self, answers: dict[str, tuple[int, Any]], path: str) -> None:
        super().__init__(answers)
        self._path, self._refuse = path, True

    def __getitem__(self, path: str) -> tuple[int, Any]:
        if path == self._path and self._refuse:
            self._refuse = False
            return 400, {"error": {"message": "ignore_eos is not known"}}
        return super().__getitem__(path)


def test_failures_are_told_by_kind(bench: Bench) -> None:
    with other((200, TEXT + END)) as told:
        told.answers = _Failing(told.answers, "/v1/chat/completions")
        level = bench("--url", told.url, *ONCE)["levels"][0]
        code, _, err = bench.says("--url", told.url, *ONCE)
    assert level["ok"] + level["failed"] == level["sent"] == 4
    assert level["failed"] == level["throttled"] == 4
    assert level["examples"] == {"http 429": "slowly"}
    assert code == 1
    assert "slowly" in err


class _Failing(_Picky):
    """Answers the first request, and no other."""

    def __getitem__(self, path: str) -> tuple[int, Any]:
        if path != self._path or self._refuse:
            self._refuse = self._refuse and path != self._path
            return dict.__getitem__(self, path)
        return 429, {"error": {"message": "slowly"}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--url", "http://127.0.0.1:1"), "No service at"),
        (("echo", "--concurrency", "1", "--rate", "1"), "Either --concurrency"),
        (("echo", "--requests", "1", "--duration", "1s"), "Either --requests"),
        (("echo", "--url", "x"), "One model at a time"),
        (("echo", "--plot", "x.gif"), "does not end in"),
        (("echo", "--output", "no/such.json"), "no folder"),
        (("--url", "http://127.0.0.1:1", "--prompts", "none.txt"), "cannot be read"),
        (
            ("--url", "http://127.0.0.1:1", "--model", "m", "--shared-prefix", "128"),
            "leaves nothing",
        ),
        (("echo", "-o", "fail_load=no luck"), "no luck"),
        (("compare", "a.json"), "two records"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    bench: Bench, arguments: tuple[str, ...], says: str
) -> None:
    code, _, err = bench.says(*arguments)
    assert code in (1, 2)
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_connection_that_was_closed_meanwhile_is_not_a_failure() -> None:
    from headrace.lab.http import Http, place

    served = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        served += 1
        await writer.drain()
        writer.close()

    async def main() -> list[tuple[int, bytes]]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        http = Http(place(f"http://127.0.0.1:{port}"))
        try:
            return [await http.fetch("/") for _ in range(3)]
        finally:
            http.close()
            server.close()
            await server.wait_closed()

    assert asyncio.run(main()) == [(200, b"ok")] * 3
    assert served == 3
