"""Starting, asking and ending: programs, services, and the load client that is one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from tests.conftest import ROOT

from headrace.core.errors import LoadFailed
from headrace.lab import drive, figures, load
from headrace.lab.drive import Program, Server

BODY = {"model": "echo", "prompt": "abcd", "max_tokens": 4, "stream": True, "ignore_eos": True}
ENDLESS = {**BODY, "max_tokens": 10**6}
ECHO = drive.serve("echo", options={"tokens_per_second": 100})


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    home = {"HEADRACE_HOME": str(tmp_path_factory.mktemp("home"))}
    async with drive.server(ECHO, home, ready="/health/ready") as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[Program]:
    async with drive.program(load.command()) as client:
        yield client


async def test_streams_are_counted_and_end(server: Server, client: Program) -> None:
    opened = await client.ask({"do": "open", "url": server.url, "bodies": [BODY, BODY]})
    assert opened["events"] >= 2
    done = await client.ask({"do": "drain", "times": True})
    assert done["running"] == 0
    assert done["reads"] <= done["events"]
    assert all(tail.rstrip().endswith("data: [DONE]") for tail in done["tails"])
    for stream in done["streams"]:
        # Four tokens at 100/s.
        assert 0 < stream["first"] < stream["last"] - done["began"]
        assert stream["events"] >= 5
        assert sum(stream["gaps"]) >= 0.02


async def test_open_streams_are_hung_up_on(server: Server, client: Program) -> None:
    assert (await client.ask({"do": "open", "url": server.url, "bodies": [ENDLESS]}))["running"]
    before = await client.ask({"do": "count"})
    assert (await client.ask({"do": "close"})) == {}
    assert before["events"] > 0
    after = await client.ask({"do": "count"})
    assert after["running"] == after["events"] == 0


async def test_requests_arrive_at_several_services_in_turn(server: Server, client: Program) -> None:
    urls = [server.url, f"{server.url}/v1"]
    command = {"do": "arrive", "urls": urls, "body": BODY, "rate": 20, "seconds": 0.25}
    services = (await client.ask(command))["services"]
    assert [len(times["first"]) for times in services] == [5, 5]
    for times in services:
        pairs = zip(times["first"], times["whole"], strict=True)
        assert all(0 < first < whole for first, whole in pairs)


PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("{}", flush=True)
time.sleep(60)
"""


async def test_processes_below_a_program_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "_CHILDREN_S", 0.1)
    async with drive.program([sys.executable, "-c", PARENT]) as program:
        assert await program.ask() == {}
        assert program.running
        (below,) = program.process().children()
    assert not program.running
    _, alive = psutil.wait_procs([below], timeout=20)
    assert not alive


async def test_an_end_before_the_start_is_an_error_with_its_reason(tmp_path: Path) -> None:
    command = drive.serve("echo", options={"fail_load": "no luck"})
    with pytest.raises(LoadFailed, match="no luck"):
        async with drive.server(command, {"HEADRACE_HOME": str(tmp_path)}, ready="/health/ready"):
            pass
    with pytest.raises(LoadFailed, match=r"within 0\.2 s"):
        async with drive.server([sys.executable, "-c", "import time; time.sleep(60)"], start_s=0.2):
            pass
    async with drive.program([sys.executable, "-c", ""]) as program:
        with pytest.raises(LoadFailed, match="without an answer"):
            await program.ask()


async def test_a_peer_that_is_given_its_port(tmp_path: Path) -> None:
    port = drive.free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--directory", str(tmp_path)]
    url = f"http://127.0.0.1:{port}"
    async with drive.server([*command, "--bind", "127.0.0.1"], url=url, ready="/") as peer:
        assert peer.program.cpu() > 0
        http = peer.http()
        assert (await http.fetch("/none"))[0] == 404
        http.close()


async def test_a_program_of_another_checkout(tmp_path: Path) -> None:
    """`--against DIR` measures the Headrace in DIR/src."""
    package = tmp_path / "src" / "headrace"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("print('{\"other\": true}', flush=True)")
    command = [sys.executable, "-c", "import headrace"]
    async with drive.program(command, drive.checkout(tmp_path)) as program:
        assert await program.ask() == {"other": True}
    assert drive.checkout(ROOT) == {"PYTHONPATH": os.fspath(ROOT / "src")}
    with pytest.raises(LoadFailed, match="no src/headrace"):
        drive.checkout(tmp_path / "src")


def test_percentiles_are_by_nearest_rank() -> None:
    assert [figures.percentile([3, 1, 2, 4], percent) for percent in (25, 50, 51, 100)] == [
        1,
        2,
        3,
        4,
    ]
    assert figures.percentile(range(1, 101), 99) == 99
    assert figures.percentile([], 99) == 0
    assert figures.spread([1, 4, 2]) == "2.000 (1.000-4.000)"
