"""The life of a service: signals, its configuration, and what it remembers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.cli.programs import HELLO, PROGRAM, ask, headrace, serving

from headrace.cli.app import run
from headrace.cli.serve import listen, url_of
from headrace.config import tree

ENDLESS = ("-o", "tokens_per_second=20", "-o", f"text={'x' * 999}")
SLOW = ("-o", "tokens_per_second=10", "-o", f"text={'x' * 20}")
STREAM = {**HELLO, "stream": True}


def until(true: Callable[[], Any], within_s: float = 30) -> Any:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def status(url: str, path: str) -> int:
    try:
        with urllib.request.urlopen(url + path, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def is_ready(url: str) -> bool:
    return status(url, "/health/ready") == 200


def test_a_service_that_drains_says_so(environ: dict[str, str]) -> None:
    """W8: ready turns false and what is new gets a 503, while what runs comes to its end."""
    with serving(environ, "echo", *SLOW) as (process, url):
        stream = ask(url, STREAM)
        first = stream.readline()
        process.send_signal(signal.SIGTERM)
        until(lambda: not is_ready(url), 1)
        assert status(url, "/health/live") == 200
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            ask(url, HELLO)
        with refused.value as answer:
            assert json.load(answer)["error"]["code"] == "draining"
        assert process.poll() is None
        rest = (first + stream.read()).decode()
        assert rest.rstrip().endswith("data: [DONE]")
        assert process.wait(5) == 0


def test_a_second_signal_waits_no_longer(environ: dict[str, str]) -> None:
    """W8: the first signal drains, the second ends at once; no child is left, exit code 0."""
    with serving(environ, "echo", "--drain-s", "60", *ENDLESS) as (process, url):
        stream = ask(url, STREAM)
        stream.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        until(lambda: not is_ready(url), 1)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest = stream.read().decode()
        assert '"error"' in rest
        assert "[DONE]" not in rest
        assert process.wait(5) == 0
        assert time.monotonic() - began < 4
        assert not any(child.is_running() for child in children)


def test_a_connection_outlives_the_patience_of_clients(environ: dict[str, str]) -> None:
    """One that has been kept for the usual five seconds is not closed as the client asks again."""
    with serving(environ, "echo") as (_, url):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/health/live")
        assert connection.getresponse().read()
        time.sleep(5.5)
        connection.request("GET", "/health/live")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.parametrize(
    ("host", "printed", "reached"),
    [
        ("::", "[::]", ("127.0.0.1", "::1")),
        ("[::]", "[::]", ("127.0.0.1", "::1")),
        ("0:0::0", "[::]", ("127.0.0.1", "::1")),
        ("[::1]", "[::1]", ("::1",)),
        ("::1", "[::1]", ("::1",)),
        ("0.0.0.0", "0.0.0.0", ("127.0.0.1",)),
    ],
)
def test_addresses_to_listen_on(host: str, printed: str, reached: tuple[str, ...]) -> None:
    """Issue 12.4: `::` is every address, and brackets are those of a URL."""
    settings = tree.ServerSettings(host=host, port=0, allow_public=True)
    with listen(settings) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://{printed}:{port}"
        for address in reached:
            socket.create_connection((address, port), timeout=5).close()


def test_a_service_on_ipv6(environ: dict[str, str]) -> None:
    """Issue 12.4: it answers by the address that it prints."""
    with serving(environ, "echo", "--host", "[::1]") as (_, url):
        assert url.startswith("http://[::1]:")
        assert status(url, "/health/live") == 200


AT_EXIT = """
import atexit, gc, os, sys
if "serve" in sys.argv or "serve" in sys.orig_argv:
    told = open(os.environ["TOLD"], "w")
    atexit.register(lambda: print(sys.getswitchinterval(), gc.get_freeze_count(), file=told))
"""


def test_the_interpreter_is_set_for_streams(environ: dict[str, str], tmp_path: Path) -> None:
    """Garbage collection and busy threads do not hold up streams; see `machine/process.py`."""
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    told = tmp_path / "told"
    environ |= {"PYTHONPATH": str(tmp_path), "TOLD": str(told)}
    with serving(environ, "echo") as (process, url):
        until(lambda: is_ready(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    interval, frozen = told.read_text().split()
    assert float(interval) == pytest.approx(0.0005)
    assert int(frozen) > 10_000


def test_a_signal_during_a_load(environ: dict[str, str]) -> None:
    """W8: a load is given up at once, exit code 0."""
    with serving(environ, "echo", "-o", "load_s=60") as (process, _):
        children = until(lambda: psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in process.stderr.read()


def test_who_follows_the_events_does_not_hold_the_service(environ: dict[str, str]) -> None:
    """W8: streams of events end with the service."""
    with serving(environ, "echo") as (process, url):
        until(lambda: is_ready(url))
        with subprocess.Popen(
            [*PROGRAM, "events", "--json", "--url", url],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as following:
            assert following.stdout is not None
            try:
                until(lambda: psutil.Process(following.pid).net_connections())
                time.sleep(0.2)
                stopping = headrace(environ, "stop", "echo", "--url", url)
                assert stopping.stdout == "echo is stopped\n"
                kinds = (json.loads(line)["kind"] for line in following.stdout)
                assert "unloaded" in kinds
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(5) == 0
                assert time.monotonic() - began < 3
                assert following.wait(5) == 0
            finally:
                following.kill()


@contextmanager
def configured(environ: dict[str, str], toml: str) -> Iterator[tuple[Any, str, Path]]:
    file = Path(environ["HOME"]) / "service.toml"
    file.write_text(toml)
    with serving(environ, "--config", str(file)) as (process, url):
        yield process, url, file


ONE = "[models.a]\nmodel = 'builtin:echo'\n"
TWO = "[models.b]\nmodel = 'builtin:echo'\npreload = false\n"


def models(url: str, key: str = "") -> dict[str, dict[str, Any]]:
    """What `ps` shows, without the seconds that a process of its own may take to start."""
    asked = urllib.request.Request(
        f"{url}/admin/models", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return {model["id"]: model for model in json.load(answer)["models"]}


def test_sighup_reads_the_configuration_again(environ: dict[str, str]) -> None:
    """M2: models and keys change while the service runs; a wrong file changes nothing."""
    with configured(environ, ONE) as (process, url, file):
        until(lambda: is_ready(url))
        file.write_text(f"home = 'other'\n[server]\nadmin_keys = ['k']\n{ONE}{TWO}")
        process.send_signal(signal.SIGHUP)
        until(lambda: status(url, "/v1/models") == 401)
        keyed = {**environ, "HEADRACE_ADMIN_KEY": "k"}
        assert list(models(url, "k")) == ["a", "b"]
        file.write_text("[server]\nprot = 2\n")
        process.send_signal(signal.SIGHUP)
        done = headrace(keyed, "reload", "--url", url)
        assert done.returncode != 0
        assert "Did you mean server.port?" in done.stderr
        assert list(models(url, "k")) == ["a", "b"]
        file.write_text(ONE)
        done = headrace(keyed, "reload", "--url", url)
        assert done.stdout == "removed  b\n"
        until(lambda: status(url, "/v1/models") == 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        log = process.stderr.read()
        assert "The configuration stays as it was: file" in log
        assert 'needs_restart=["home"]' in log
        assert "Traceback" not in log


@pytest.mark.usefixtures("as_environ")
def test_what_was_done_by_hand_is_done_again(
    environ: dict[str, str], free_port: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """M8: pinned, changed, stopped and added models are so again after a restart."""
    port = str(free_port())
    file = Path(environ["HOME"]) / "headrace.toml"
    file.write_text(ONE + TWO)
    arguments = [*PROGRAM, "serve", "--json", "--port", port]
    url = f"http://127.0.0.1:{port}"

    def command(*words: str) -> None:
        code = run([*words, "--url", url])
        assert code == 0, capsys.readouterr().err

    for turn in range(2):
        with subprocess.Popen(
            arguments, env=environ, cwd=environ["HOME"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if turn == 0:
                command("start", "b")
                command("update", "b", "keep_alive=1h", "options.tokens_per_second=50")
                command("pin", "a")
                command("stop", "a")
                command("start", "builtin:echo")
                other = headrace(environ, "serve", "--port", port)
                assert (other.returncode, "Cannot listen" in other.stderr) == (2, True)
            until(lambda: any(one["state"] == "ready" for one in models(url).values()))
            found = models(url)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert set(found) == {"a", "b", "echo"}
        assert (found["a"]["pinned"], found["a"]["state"] in ("created", "stopped")) == (True, True)
        assert (found["b"]["keep_alive"], found["b"]["pinned"]) == (3600.0, False)
        assert found["b"]["options"]["tokens_per_second"] == 50.0


def test_two_services_with_one_state_file(environ: dict[str, str], tmp_path: Path) -> None:
    shared = {**environ, "HEADRACE_STATE": str(tmp_path / "shared.json")}
    with serving(shared, "echo"):
        done = headrace(shared, "serve", "echo", "--port", "0")
        assert done.returncode == 2
        assert "shared.json" in done.stderr


def test_a_service_goes_with_its_terminal(environ: dict[str, str]) -> None:
    """W8: whoever closes the window that it runs in wants its memory back."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(PROGRAM[0], [*PROGRAM, "serve", "echo", "--port", "0"], environ)
    try:
        seen = b""
        while b"Try: " not in seen:
            seen += os.read(terminal, 4096)
        os.close(terminal)
        ended(child)
    finally:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


def ended(child: int) -> int:
    """Wait for a process that was forked here, and return its exit code."""
    found = until(lambda: next((one for one in [os.waitpid(child, os.WNOHANG)] if one[0]), None))
    return os.waitstatus_to_exitcode(found[1])


def on_terminal(environ: dict[str, str], *arguments: str, until_seen: str) -> str:
    """Run a command on a terminal until it has shown a pattern, then press Ctrl-C."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(PROGRAM[0], [*PROGRAM, *arguments], environ)
    seen = b""
    try:
        while not re.search(until_seen.encode(), seen, re.DOTALL):
            seen += os.read(terminal, 4096)
        os.kill(child, signal.SIGINT)
        assert ended(child) in (0, 130)
    finally:
        os.close(terminal)
    return seen.decode()


def test_a_terminal_shows_what_goes_on(environ: dict[str, str]) -> None:
    """M4: a load shows its progress, `ps --watch` overwrites what it has shown."""
    slow = {**environ, "COLUMNS": "150", "TERM": "xterm"}
    # It is loaded when it is asked for, so that the load is not over before one looks.
    toml = "[models.echo]\nmodel = 'builtin:echo'\npreload = false\noptions.load_s = 2\n"
    with configured(environ, toml) as (_, url, _):
        shown = on_terminal(slow, "start", "echo", "--url", url, until_seen="loading")
        assert "\x1b[" in shown
        shown = on_terminal(slow, "ps", "--watch", "--url", url, until_seen="NAME.*NAME.*ready")
        assert shown.startswith("\x1b[H")
    lines = headrace(environ, "ps", "--watch", "--json", "--url", "http://127.0.0.1:1")
    assert lines.returncode == 1


def test_plan_without_a_service(environ: dict[str, str], free_port: Callable[[], int]) -> None:
    """M6: what a load would need is told for this machine, with nothing running."""
    alone = {**environ, "HEADRACE_PORT": str(free_port())}
    done = headrace(alone, "plan", "echo", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["fits"], found["loaded"]) == (True, False)
    tight = {**alone, "HEADRACE_MEMORY": "1MB"}
    done = headrace(tight, "plan", "echo")
    assert done.returncode == 1, done.stdout
    assert "1.0 MB" in done.stdout
