"""What every test gets: a clean environment, a home of its own, and the real model on demand."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import httpx
import httpx2
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from tests import ports
from xdist.scheduler import LoadScopeScheduling

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run tries the same examples, at any load; `--hypothesis-profile default` looks for others.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

ALONE = (
    "service/test_cancellation.py",
    "service/test_true_figures.py",
    "worker/test_real.py",
)
"""Tests that measure milliseconds: no other test of this home runs beside them."""
LONG = (
    *("lab/bench/test_bench.py", "cli/", "service/", "telemetry/test_export.py"),
    *("telemetry/test_attempts.py", "test_docs.py", "worker/test_process.py"),
    *("lab/cases/", "lab/tune/test_tune.py", "pool/test_steps.py"),
    *("engines/", "worker/", "models/test_store", "test_model_worker.py", "text/test_template.py"),
)
"""Files that take long for their number of tests; at the end, one process would run them alone."""

ROOT = Path(__file__).resolve().parents[1]
TEST_ROUNDS = int(os.environ.pop("HEADRACE_TEST_ROUNDS", "0"))
"""How often tests of chance try; 0 leaves it to each. The services they start must not see it."""
MODEL_HOME = Path(os.environ.pop("HEADRACE_TEST_HOME", "") or ROOT / ".cache" / "test-home")


def _place(item: pytest.Item) -> str:
    return _relative(item.path)


@cache
def _relative(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long."""
    sizes = Counter(map(_place, items))

    def turn(item: pytest.Item) -> tuple[bool, bool, int, str]:
        place = _place(item)
        return not place.startswith(ALONE), not place.startswith(LONG), -sizes[place], place

    # At the beginning nobody has to leave first, and at the end nobody waits for a long one.
    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Take what collecting has made, 500 MB, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def light_collections() -> None:
    """Take what earlier tests have left out of the garbage collections of a file's tests."""
    gc.collect()
    gc.freeze()


class ByModel(LoadScopeScheduling):
    """Gives a whole file to one process, as what it has started serves all of its tests.

    The contract is one file with many models; all tests of a model go to one process.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        if file.endswith("test_contract.py") and name.count("-") >= 2:
            return f"{file} {name.rsplit('-', 2)[1]}"
        return file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Tell pytest-xdist what belongs together, and to keep the order."""
    config.option.loadscopereorder = False
    return ByModel(config, log)


_inside: list[IO[str]] = []
"""The lock that this process holds."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, Any, Any]:
    """Let tests that measure run alone, and all others beside one another."""
    alone = _place(item).startswith(ALONE)
    if not _inside:
        _enter(fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        # Whoever is alone stays so for the next one: the others need not leave once more.
        if not (alone and nextitem is not None and _place(nextitem).startswith(ALONE)):
            _inside.pop().close()


def _enter(how: int) -> None:
    MODEL_HOME.mkdir(parents=True, exist_ok=True)
    _inside.append((MODEL_HOME / "tests.lock").open("a"))
    # Who waits at the door lets nobody else in, so that the house gets empty.
    with (MODEL_HOME / "door.lock").open("a") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(_inside[0], how)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _certificates_read_once() -> Iterator[None]:
    """Let all clients share the certificates: each would take 35 ms to read them again."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (httpx, httpx2):
            read = cache(module.create_ssl_context)
            monkeypatch.setattr(f"{module.__name__}._transports.default.create_ssl_context", read)
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Reset the levels of the log: commands set some, which would hide records from later tests."""
    before = {log: log.level for log in _loggers()}
    yield
    for log in _loggers():
        log.setLevel(before.get(log, logging.NOTSET))


def _loggers() -> list[logging.Logger]:
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "headrace"]
    return [logging.getLogger(name) for name in names]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HEADRACE_HOME."""
    path = tmp_path / "home"
    monkeypatch.setenv("HEADRACE_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    return _fetched("smollm2")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2 as safetensors."""
    return _fetched("all-minilm-l6-v2")


def _fetched(name: str) -> Path:
    """Return a real model, which is fetched once and kept for later runs."""
    from headrace.models.reference import parse
    from headrace.models.store import Store

    MODEL_HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(MODEL_HOME / "fetch.lock"):
        return Store(MODEL_HOME).fetch(parse(name))


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Returns a port of the loopback address that nobody listens on."""
    return ports.free_port
