"""What the process of a model cannot do any more, and what the service says of it."""

from __future__ import annotations

import json
import resource
import socket
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.packages import bring_engine
from tests.worker.rig import ask, echo, resolve

from headrace.core import confine
from headrace.core.errors import HeadraceError, LoadFailed
from headrace.core.stream import collect
from headrace.worker.process import WorkerProcess

GIB = 1 << 30

ENGINE = '''
"""An engine that tries what it may not, as a library would that a model's file has taken over."""
import json, os, signal, socket, tempfile
from pathlib import Path
from pydantic import Field
from headrace.engines import echo
from headrace.engines.base import About, EngineOptions

ABOUT = About(formats=("none",), automatic=False, confined=True)

class Options(EngineOptions):
    path: str = Field("/none/there", description="A file to change.")
    port: int = Field(0, description="A port to connect to.")
    allocate: int = Field(0, description="Bytes to allocate.")
    native: bool = Field(False, description="As a library that ends the process.")
    told: str = Field("", description="The folder that is told.")

def writes(request):
    return (Path(request.options["told"]),)

def tried(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"

class Engine(echo.Engine):
    def __init__(self, request):
        options = Options(**request.options)
        path = Path(options.path)
        results = {
            "temporary": tried(lambda: Path(tempfile.gettempdir(), "x").write_text("x")),
            "null": tried(lambda: Path(os.devnull).write_text("x")),
            "write": tried(lambda: path.write_text("x")),
            "remove": tried(path.unlink),
            "beside": tried(lambda: path.with_name("new").touch()),
            "read": tried(path.read_text),
            "connect": tried(lambda: socket.create_connection(("127.0.0.1", options.port), 5)),
            "listen": tried(lambda: socket.create_server(("127.0.0.1", 0))),
            "signal": tried(lambda: os.kill(os.getppid(), 0)),
            "core": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE),
            "privileges": "NoNewPrivs:\\t1" in Path("/proc/self/status").read_text(),
        }
        Path(options.told, "told").write_text(json.dumps(results))
        try:
            self.block = bytearray(options.allocate)
        except MemoryError:
            if options.native:
                os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n")
                os.abort()
            raise
        import msgspec
        super().__init__(msgspec.structs.replace(request, options={}))
'''

needs_landlock = pytest.mark.skipif(confine.landlock() < 4, reason="this kernel has no Landlock 4")


@pytest.fixture(autouse=True)
def trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another package."""
    bring_engine("trying", ENGINE, tmp_path / "site", monkeypatch)


def worker(*, confine: bool = True, booked: int | None = None, **given: Any) -> WorkerProcess:
    def resolved(spec: Any, on_progress: Any) -> Any:
        spec = resolve(spec, on_progress)
        return msgspec.structs.replace(spec, engine="trying", booked=booked)

    return WorkerProcess(echo(**given), resolved, confine=confine)


async def results(folder: Path, port: int, **given: Any) -> dict[str, Any]:
    """Return what became of each try."""
    (folder / "told").mkdir()
    secret = folder / "secret"
    secret.write_text("secret")
    one = worker(path=str(secret), port=port, told=str(folder / "told"), **given)
    await one.start()
    try:
        assert (await collect(one.ask(ask("ab")))).text == "ab", "it answers all the same"
    finally:
        await one.aclose()
    return json.loads((folder / "told" / "told").read_text())


@needs_landlock
async def test_a_process_cannot_write_or_connect(tmp_path: Path) -> None:
    """Issue 11.14: only to its temporary directory, and to what its engine names."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = await results(tmp_path, server.getsockname()[1])
    denied = "PermissionError"
    assert told == {
        "temporary": "done",
        "null": "done",
        "write": denied,
        "remove": denied,
        "beside": denied,
        "read": "done",
        "connect": denied,
        "listen": denied,
        "signal": denied if confine.landlock() >= 6 else "done",
        "core": [0, 0],
        "privileges": True,
    }
    assert (tmp_path / "secret").read_text() == "secret"


async def test_it_is_off_by_a_setting(tmp_path: Path) -> None:
    """Issue 11.14: and then everything is as the user may."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = await results(tmp_path, server.getsockname()[1], confine=False)
    assert {told[key] for key in ("write", "remove", "beside", "connect", "listen")} == {"done"}
    assert told["core"] == list(resource.getrlimit(resource.RLIMIT_CORE))


@pytest.mark.parametrize("native", [False, True])
async def test_a_process_that_allocates_too_much_ends_with_a_clear_error(
    native: bool, tmp_path: Path
) -> None:
    """Issue 11.14: an exception of Python, or the end of the process; the service goes on."""
    given = {"booked": 1 << 20, "told": str(tmp_path), "native": native}
    fits = worker(allocate=GIB, **given)
    await fits.start()
    assert fits.pid is not None
    limits = Path(f"/proc/{fits.pid}/limits").read_text()
    one = worker(allocate=64 * GIB, **given)
    with pytest.raises(HeadraceError, match=r"(?i)ran out of memory") as caught:
        await one.start()
    if native:
        assert isinstance(caught.value, LoadFailed)
        assert "it may allocate 4." in str(caught.value)
    assert f"Max data size             {fits._resolved and fits._resolved.memory_limit}" in limits
    assert (await collect(fits.ask(ask("ab")))).text == "ab"
    await one.aclose()
    await fits.aclose()


async def test_a_model_without_a_booking_has_no_limit(tmp_path: Path) -> None:
    """A library for GPUs maps more than it uses."""
    one = worker(told=str(tmp_path))
    await one.start()
    assert one.pid is not None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert psutil.Process(one.pid).rlimit(resource.RLIMIT_DATA) == before
    await one.aclose()


COST = """
import time
from pathlib import Path
from headrace.core import confine
began = time.perf_counter()
confine.give_up_privileges()
confine.limit_memory(1 << 34)
confine.restrict([Path("/tmp")])
print(time.perf_counter() - began)
"""


def test_it_costs_little() -> None:
    """Issue 11.14: under a millisecond of each load; measured in a process of its own."""
    import subprocess
    import sys

    command = [sys.executable, "-c", COST]
    took = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.02


def test_a_kernel_without_landlock_restricts_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "landlock", lambda: 0)
    assert not confine.restrict([Path("/")])
    assert confine.abilities()["writes"] == "not restricted: no Landlock in this kernel"
    monkeypatch.setattr(confine, "landlock", lambda: 3)
    assert confine.abilities()["tcp"] == "not restricted: Landlock 3 is too old"
