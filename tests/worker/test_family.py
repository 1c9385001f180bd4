"""What a child starts ends with it, however it tries to stay; and what it inherits."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.packages import bring_engine
from tests.worker.rig import ask, echo, first_delta, resolve, until

from headrace.core.errors import WorkerDied
from headrace.core.stream import collect
from headrace.worker.process import WorkerProcess

STAYS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if "leaves" in sys.argv:
    os.setsid()
if "orphan" in sys.argv and os.fork():
    os._exit(0)
held = b"x" * (30 << 20)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
"""A grandchild that ignores its pipe and SIGTERM."""

ENGINE = '''
"""An engine that starts a process of its own, and tells what it was given."""
import json, os, subprocess, sys
from pathlib import Path
from pydantic import Field
from headrace.engines import echo
from headrace.engines.base import About, EngineOptions

ABOUT = About(formats=("none",), automatic=False)

class Options(EngineOptions):
    start: list[str] = Field([], description="A program and its arguments.")
    cleared: bool = Field(False, description="It gets an empty environment.")
    told: str | None = Field(None, description="The file to which the environment is written.")

class Engine(echo.Engine):
    def __init__(self, request):
        options = Options(**request.options)
        if options.start:
            environment = {} if options.cleared else None
            self.started = subprocess.Popen(options.start, stdin=subprocess.PIPE, env=environment)
        if options.told:
            Path(options.told).write_text(json.dumps([dict(os.environ), request.device]))
        import msgspec
        super().__init__(msgspec.structs.replace(request, options={"tokens_per_second": 20}))
'''


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that a package on the path brings."""
    bring_engine("starting", ENGINE, tmp_path / "site", monkeypatch)
    return "starting"


def worker(engine: str, **given: Any) -> WorkerProcess:
    def resolved(spec: Any, on_progress: Any) -> Any:
        import msgspec

        return msgspec.structs.replace(resolve(spec, on_progress), engine=engine)

    return WorkerProcess(echo(**given), resolved)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("how", "cleared"),
    [((), False), (("leaves",), False), (("leaves", "orphan"), False), (("leaves",), True)],
)
@pytest.mark.parametrize("end", ["unload", "kill"])
async def test_a_grandchild_that_stays_is_ended(
    how: tuple[str, ...], cleared: bool, end: str, starting: str, tmp_path: Path
) -> None:
    """Issue 11.15: one that ignores SIGTERM and its closed pipe, and one with its own session."""
    file, program = tmp_path / "pid", tmp_path / "stays.py"
    program.write_text(STAYS)
    start = [sys.executable, str(program), str(file), *how]
    one = worker(starting, start=start, cleared=cleared)
    await one.start()
    try:
        await until(file.exists, 20)
        grandchild = int(file.read_text())
        assert alive(grandchild)
        held = await one.memory()
        assert held["cpu"] > 30 << 20
        if end == "unload":
            await one.aclose()
        else:
            assert one.pid is not None
            stream = one.ask(ask("a" * 50))
            await first_delta(stream)
            os.kill(one.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                async for _ in stream:
                    pass
        assert not alive(grandchild), "nothing of it lives when the stream has its error"
    finally:
        await one.aclose()
    assert await one.memory() == {}


async def test_an_unload_waits_for_the_memory_of_the_whole_family(
    starting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.15: the driver may still count what a process held that has ended."""
    from headrace.machine import Device, process

    file, program = tmp_path / "pid", tmp_path / "stays.py"
    program.write_text(STAYS)
    one = worker(starting, start=[sys.executable, str(program), str(file), "leaves"])
    await one.start()
    await until(file.exists, 20)
    grandchild, looks = int(file.read_text()), 0

    def gpus(pids: Any) -> Any:
        nonlocal looks
        looks += grandchild in pids and not alive(grandchild)
        if grandchild in pids and looks < 4:
            yield Device(name="cuda:0 Mill", kind="cuda", total=9, used=9, worker_used=9)

    monkeypatch.setattr(process, "gpus", gpus)
    await one.aclose()
    assert looks == 4


async def test_what_a_child_starts_has_no_connection_to_the_service() -> None:
    """Issue 11.14: what compiles the schemas of clients could speak for the child."""
    one = WorkerProcess(echo(), resolve)
    await one.start()
    try:
        assert one.pid is not None
        number = psutil.Process(one.pid).cmdline()[-2]
        facts = Path(f"/proc/{one.pid}/fdinfo/{number}").read_text()
        flags = int(facts.partition("flags:")[2].split()[0], 8)
        assert flags & os.O_CLOEXEC
    finally:
        await one.aclose()


async def test_a_child_gets_no_secret(
    starting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.12: what engines need is passed, and what the model's settings add."""
    import json

    secret = {
        *("HEADRACE_API_KEYS", "HEADRACE_ADMIN_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "HF_TOKEN", "VLLM_API_KEY"),
        *("LLAMA_ARG_API_KEY", "GITHUB_TOKEN", "DATABASE_URL", "https_proxy", "MY_PASSWORD"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "OTEL_EXPORTER_OTLP_HEADERS", "SSH_AUTH_SOCK"),
    }
    passed = {
        *("HF_HOME", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_CACHE_PATH", "LC_ALL"),
        *("TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "NVIDIA_VISIBLE_DEVICES"),
    }
    for name in secret | passed | {"WANTED", "ALSO"}:
        monkeypatch.setenv(name, "C" if name == "LC_ALL" else "v41ue")
    file = tmp_path / "told"
    one = worker(
        starting, told=str(file), env={"WANTED": None, "OWN": "mine", "OPENAI_API_KEY": "x"}
    )
    await one.start()
    try:
        environment, _ = json.loads(file.read_text())
        assert one.pid is not None
        at_start = psutil.Process(one.pid).environ()
        assert at_start["OWN"] == "mine", "there before any library"
        assert (environment["WANTED"], environment["OPENAI_API_KEY"]) == ("v41ue", "x")
        assert environment.keys() & (secret | {"ALSO"}) == {"OPENAI_API_KEY"}
        assert at_start.keys() & secret == {"OPENAI_API_KEY"}
        assert environment.keys() >= passed | {"PATH", "TMPDIR"}
    finally:
        await one.aclose()


async def test_a_warm_process_gets_no_secret_and_none_of_a_models_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 11.12: a model with variables of its own starts with them."""
    from headrace.worker.process import WarmProcess

    monkeypatch.setenv("OPENAI_API_KEY", "v41ue")
    warm = WarmProcess()
    warm.keep(True)
    plain = WorkerProcess(echo(), resolve, spawn=warm.take)
    own = WorkerProcess(echo(env={"OWN": "mine"}), resolve, spawn=warm.take)
    try:
        await asyncio.gather(own.start(), plain.start())
        assert own.pid is not None
        assert plain.pid is not None
        assert psutil.Process(own.pid).environ()["OWN"] == "mine"
        environment = psutil.Process(plain.pid).environ()
        assert not environment.keys() & {"OWN", "OPENAI_API_KEY"}
        await collect(plain.ask(ask()))
    finally:
        await asyncio.gather(own.aclose(), plain.aclose(), warm.aclose())
