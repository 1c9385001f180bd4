from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tests.worker.rig import ask, worker

from headrace import machine
from headrace.core.errors import ConfigError
from headrace.core.metrics import DeviceUse
from headrace.core.stream import collect
from headrace.machine import Device, Sampler, Watch, devices, system


def device(worker_used: int, name: str = "cpu", used: int = 50) -> Device:
    return Device(name=name, kind="cpu", total=100, used=used, worker_used=worker_used)


def test_mean_and_peak_are_over_the_samples() -> None:
    """T6, W16: by hand."""
    watch = Watch([device(10)])
    assert watch.result()[0].worker_mean == 10
    watch.add([device(40, used=70)])
    watch.add([device(10, used=60)])
    assert watch.result() == (
        DeviceUse(name="cpu", total=100, used=60, worker_used=10, worker_mean=20, worker_peak=40),
    )


def test_a_device_that_comes_or_goes_breaks_nothing() -> None:
    """T6: a GPU that appears while a request runs."""
    watch = Watch([device(10)])
    watch.add([device(20), device(6, "cuda:0")])
    names = {use.name: use.worker_peak for use in watch.result()}
    assert names == {"cpu": 20, "cuda:0": 6}
    watch.add([device(30)])
    assert [use.name for use in watch.result()] == ["cpu"]


class Samples:
    """Counts the looks at the devices; each holds one byte more than the last."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, pid: int | None = None) -> tuple[Device, ...]:
        self.count += 1
        return (device(self.count),)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> Samples:
    counted = Samples()
    monkeypatch.setattr(machine, "devices", counted)
    return counted


def test_the_sampler_follows_each_request_from_its_own_start(samples: Samples) -> None:
    """T6: many at once, on one sample each time."""
    sampler = Sampler(period_s=0.02)
    first = sampler.watch()
    time.sleep(0.1)
    second = sampler.watch()
    (late,) = sampler.release(second)
    time.sleep(0.1)
    (use,) = sampler.release(first)
    sampler.close()
    sampler.close()
    assert use.worker_peak > late.worker_peak > 1
    assert 1 < use.worker_mean < use.worker_peak
    count = samples.count
    time.sleep(0.06)
    assert samples.count == count, "it has ended"
    assert sampler.release(first) == (use,)


async def test_devices_are_looked_at_twice_a_second_at_most(samples: Samples) -> None:
    """T6: never on the way of a token, however many there are."""
    async with worker() as one:
        before, began = samples.count, time.monotonic()
        for _ in range(20):
            result = await collect(one.generate(ask("a" * 200)))
            assert result.metrics.devices
        elapsed = time.monotonic() - began
        assert samples.count - before <= elapsed * 2 + 1
        start = samples.count
        await asyncio.sleep(1.2)
        assert 2 <= samples.count - start <= 3


def test_devices_are_those_of_this_machine() -> None:
    """W22, T6: bytes; the host first; for any process."""
    host = devices()[0]
    assert (host.name, host.kind) == ("cpu", "cpu")
    assert 0 < host.total <= psutil.virtual_memory().total
    assert host.total == machine.host_memory()
    assert 0 < host.worker_used < host.total
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert 0 < devices(child.pid)[0].worker_used != host.worker_used
        child.kill()


def test_a_gpu_tells_what_one_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: through the driver's library, where there is one."""
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)
    unknown = SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    other = SimpleNamespace(pid=1, usedGpuMemory=100)
    driver: Any = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=1000, used=300),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [mine, other, unknown],
        nvmlDeviceGetName=lambda handle: "Mill",
        NVMLError=RuntimeError,
    )
    monkeypatch.setattr(machine, "_nvml", lambda: driver)
    gpu = devices()[1]
    assert gpu == Device(name="cuda:0 Mill", kind="cuda", total=1000, used=300, worker_used=7)
    assert gpu.key == "cuda:0"
    held = machine.process_memory(os.getpid())
    assert held.keys() == {"cpu", "cuda:0"}
    assert held["cuda:0"] == 7

    def lost(index: int) -> int:
        raise RuntimeError(index)

    driver.nvmlDeviceGetHandleByIndex = lost
    assert [device.key for device in devices()] == ["cpu"]


def test_the_system_describes_itself() -> None:
    """W5: OS, CPU, instruction sets, memory, library versions, devices."""
    told = system()
    assert told.cores <= told.threads
    assert told.python.count(".") == 2
    assert told.cpu
    assert "msgspec" in told.libraries
    assert told.devices[0].total > 0
    assert set(told.instruction_sets) <= set(machine._INSTRUCTION_SETS)


def test_a_machine_without_cpuinfo_has_a_name_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "nothing")
    assert machine._cpu()[0]
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "arm")
    assert system().instruction_sets == ("asimd",)


def test_the_memory_of_a_process_is_its_own_and_gone_with_it() -> None:
    """M2: measured, in bytes by device."""
    code = "held = b'x' * (50 << 20); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert 50 << 20 < machine.process_memory(child.pid)["cpu"] < 100 << 20
        child.kill()
        child.wait()
        assert machine.process_memory(child.pid) == {}


MACHINE = (
    Device(name="cpu", kind="cpu", total=1000 << 20, used=0),
    Device(name="cuda:0 Mill", kind="cuda", total=500 << 20, used=0),
)


@pytest.mark.parametrize(
    ("setting", "cpu", "gpu"),
    [
        ((), 800, 450),
        (("50%",), 500, 450),
        (("512MiB",), 512, 450),
        (("512 M", "cuda:0=50%"), 512, 250),
        (("cpu=12.5%", "cuda:0=100mib"), 125, 100),
        (("cpu=0.5g",), 512, 450),
    ],
)
def test_a_budget_is_an_amount_or_a_share(setting: tuple[str, ...], cpu: int, gpu: int) -> None:
    """M2: of the host where no device is named."""
    expected = {"cpu": cpu << 20, "cuda:0": gpu << 20}
    assert machine.budgets(setting, MACHINE) == expected
    assert machine.budgets(["1MB"], MACHINE)["cpu"] == 1_000_000


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("much", "like 16GiB, 80%, cpu=16GiB"),
        ("12", "like 16GiB"),
        ("12XiB", "like 16GiB"),
        ("-5%", "like 16GiB"),
        ("", "like 16GiB"),
        ("cuda:1=5%", "no device cuda:1, but cpu, cuda:0"),
        ("0%", "give some of them"),
        ("101%", "cpu has 1048576000 bytes"),
        ("cuda:0=1TiB", "cuda:0 has 524288000 bytes"),
    ],
)
def test_a_wrong_budget_says_what_is_right(word: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        machine.budgets([word], MACHINE)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system shows its control groups, with nothing in it."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def test_the_host_is_as_large_as_the_control_group_allows(groups: Path, tmp_path: Path) -> None:
    """M2: version 2, where a group above may have the limit; files that can go are free."""
    (tmp_path / "own").write_text("0::/outer/inner\n")
    write(groups / "outer", memory__max=90_000, memory__current=50_000)
    write(groups / "outer", memory__stat="anon 5\ninactive_file 20000")
    write(groups / "outer/inner", memory__max="max", memory__current=1)
    host = devices()[0]
    assert (host.total, host.used) == (90_000, 30_000)
    assert machine.host_memory() == 90_000


def test_the_first_version_of_control_groups_counts_too(groups: Path, tmp_path: Path) -> None:
    """M2: in a container only the top may be there, under the path of the host."""
    (tmp_path / "own").write_text("9:name=systemd:/x\n4:memory:/docker/abc\n")
    write(groups / "memory", memory__limit_in_bytes=70_000, memory__usage_in_bytes=80_000)
    host = devices()[0]
    assert (host.total, host.used) == (70_000, 70_000)


def test_no_limit_is_the_whole_machine(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:memory:/\n0::/\n")
    write(groups / "memory", memory__limit_in_bytes=1 << 62, memory__usage_in_bytes=5)
    write(groups, memory__max="max")
    assert devices()[0].total == psutil.virtual_memory().total
    (tmp_path / "own").unlink()
    machine._cgroups.cache_clear()
    assert devices()[0].total == psutil.virtual_memory().total
