"""One service for the programs of others: the echo engine, and a real model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.conftest import ROOT
from tests.ports import free_port
from tests.programs import record
from tests.service.serving import served

PREFIX = ROOT / ".venv-programs"
# They report to their makers and look for updates, which there is no network for.
QUIET = {
    "AIDER_ANALYTICS": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "DO_NOT_TRACK": "true",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "QWEN_CODE_SUPPRESS_YOLO_WARNING": "1",
    "SCARF_NO_ANALYTICS": "true",
}


# Codex has a grammar of patches for models that it knows by name.
MODELS = """
[models.echo]
model = "builtin:echo"
[models.forms]
model = "builtin:echo"
options = {forms = true}
[models."gpt-5.5"]
model = "builtin:echo"
[models.smollm2]
"""


@pytest.fixture(scope="session")
def url(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("service") / "headrace.toml"
    file.write_text(MODELS)
    with served(environment={"CONFIG": str(file)}) as service:
        yield service.url


@pytest.fixture
def environ(tmp_path: Path, url: str) -> dict[str, str]:
    """The variables of a program: a home of its own, and nothing of this process."""
    folders = [str(PREFIX / "node" / "node_modules" / ".bin")]
    # aider brings a litellm without its proxy.
    folders += [str(PREFIX / name / "bin") for name in ("litellm", "aider", "llm", "open-webui")]
    path = ":".join([*folders, os.environ["PATH"]])
    home = tmp_path / "home"
    home.mkdir()
    fixed = {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "TERM": "dumb"}
    return {**QUIET, **fixed, "HEADRACE_URL": url}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that a program works in: its file has the secret that it is to read."""
    path = tmp_path / "work"
    path.mkdir()
    (path / "notes.txt").write_text("The secret word is heron.\n")
    return path


def until(happened: Callable[[], bool], log: Path, within_s: float = 240) -> None:
    end = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.3)


@contextmanager
def running(
    command: Sequence[str], environ: dict[str, str], folder: Path, health: str
) -> Iterator[httpx.Client]:
    """Run a server that takes `--host` and `--port`, until the end; yield a client of it."""
    port, log = free_port(), folder / "log"
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environ, cwd=folder, stdout=file, stderr=file)

    def has_started() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(httpx.TransportError):
            return client.get(health).status_code == 200
        return False

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(has_started, log)
            yield client
    finally:
        process.kill()
        process.wait()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what was tried, by the properties of the test."""
    properties = dict(report.user_properties)
    if report.when == "call" and "client" in properties:
        client, version, tried = (str(properties[k]) for k in ("client", "version", "tried"))
        record.note(client, version, tried, works=report.passed)
