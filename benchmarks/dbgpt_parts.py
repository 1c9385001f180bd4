"""DB-GPT's own parts, each in a process of its own, from the environment `.venv-dbgpt`.

`scripts/install dbgpt` makes it. benchmarks/dbgpt.py and tests/dbgpt use this.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BIN = Path(__file__).resolve().parents[1] / ".venv-dbgpt" / "bin"
_STARTED_S = 600.0
_COMMAND_S = 120.0

CONTROLLER = """
[service.model.controller]
host = "127.0.0.1"
port = {port}
heartbeat_interval_secs = 1
heartbeat_timeout_secs = 60
"""
API_SERVER = """
[service.model.api]
host = "127.0.0.1"
port = {port}
controller_addr = "{controller}"
"""
WORKER = """
[service.model.worker]
host = "127.0.0.1"
port = {port}
worker_type = "llm"
register = true
controller_addr = "{controller}"
heartbeat_interval = 1
{hooks}
[[models.llms]]
name = "{name}"
provider = "{provider}"
api_base = "{api_base}"
api_key = "none"
"""

WEB_SERVER = """
[system]
language = "en"
[service.web]
host = "127.0.0.1"
port = {port}
light = true
controller_addr = "{controller}"
remote_embedding = true
remote_rerank = true
[service.web.database]
type = "sqlite"
path = "{folder}/pilot/meta_data/dbgpt.db"
[rag.storage.vector]
type = "chroma"
persist_path = "{folder}/pilot/data"
[[models.embeddings]]
name = "vectors"
provider = "proxy/openai"
[[models.rerankers]]
name = "ranks"
provider = "proxy/openapi"
"""


class Part(NamedTuple):
    """A running part; its output is in the file `log`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """Return a port of the loopback address on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of DB-GPT's programs: a home of their own, and no proxy."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(folder), "PYTHONUNBUFFERED": "1", "TERM": "xterm"}


@contextlib.contextmanager
def part(folder: Path, kind: str, text: str, port: int, probe: str) -> Iterator[Part]:
    """Run `dbgpt start KIND` with this configuration, until it is left.

    It has started when `probe` is a path that is answered with 200.
    """
    name = f"{kind}-{port}"
    file, log = folder / f"{name}.toml", folder / f"{name}.log"
    file.write_text(text)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [BIN / "dbgpt", "start", kind, "-c", file],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=environment(folder),
        )
    started = Part(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_for(started, probe)
        yield started
    finally:
        process.kill()
        process.wait()


def wait_for(started: Part, probe: str) -> None:
    """Wait until a part answers with 200.

    Raises:
        RuntimeError: it has ended, or takes too long.
    """
    end = time.monotonic() + _STARTED_S
    while (left := end - time.monotonic()) > 0 and started.process.poll() is None:
        # Without a short limit: an answer can take long, and longer beside that to another probe.
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(started.url + probe, timeout=left),
        ):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{started.url} does not answer:\n{started.log.read_text()[-2000:]}")


def controller(folder: Path, port: int = 0) -> contextlib.AbstractContextManager[Part]:
    """Run a controller, which looks for dead workers every second."""
    port = port or free_port()
    return part(folder, "controller", CONTROLLER.format(port=port), port, "/api/health")


def api_server(folder: Path, controller: str) -> contextlib.AbstractContextManager[Part]:
    """Run an API server of the cluster with this controller."""
    port = free_port()
    text = API_SERVER.format(port=port, controller=controller)
    return part(folder, "apiserver", text, port, "/api/v1/models")


def web_server(folder: Path, controller: str) -> contextlib.AbstractContextManager[Part]:
    """Run the web server, whose models are those of the cluster with this controller."""
    port = free_port()
    text = WEB_SERVER.format(port=port, controller=controller, folder=folder)
    return part(folder, "webserver", text, port, "/api/v1/model/types")


def own_worker(
    folder: Path, controller: str, name: str, provider: str, api_base: str, hooks: str = ""
) -> contextlib.AbstractContextManager[Part]:
    """Run DB-GPT's own worker with a model of another server."""
    port = free_port()
    text = WORKER.format(
        port=port, controller=controller, name=name, provider=provider, api_base=api_base,
        hooks=hooks,
    )  # fmt: skip
    return part(folder, "worker", text, port, "/api/worker/models/supports")


def command(folder: Path, controller: str, *arguments: str, typed: str = "") -> str:
    """Run `dbgpt model ...` and return what it prints.

    Raises:
        RuntimeError: it fails.
    """
    return _run(folder, [str(BIN / "dbgpt"), "model", "--address", controller, *arguments], typed)


def python(folder: Path, code: str) -> str:
    """Run a program in DB-GPT's environment and return what it prints.

    Raises:
        RuntimeError: it fails.
    """
    return _run(folder, [str(BIN / "python"), "-c", code], "")


def _run(folder: Path, arguments: list[str], typed: str) -> str:
    done = subprocess.run(
        arguments,
        input=typed,
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
        check=False,
        cwd=folder,
        env=environment(folder),
    )
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout
