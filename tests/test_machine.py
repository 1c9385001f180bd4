from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tests.worker.rig import ask, worker

from headrace import engines, machine
from headrace.core.errors import ConfigError
from headrace.core.metrics import DeviceUse
from headrace.core.model import ModelFile
from headrace.core.stream import collect
from headrace.engines import llamacpp
from headrace.engines.base import OpenRequest
from headrace.engines.measured import machine_id
from headrace.engines.openmp import physical_cores
from headrace.machine import Device, Sampler, devices, facts, hardware, sampler, system


def device(worker_used: int, name: str = "cpu", used: int = 50, **meters: float) -> Device:
    kind = name.partition(":")[0]
    return Device(name=name, kind=kind, total=100, used=used, worker_used=worker_used, **meters)


class Scene:
    """A sampler whose clock and devices are ours; it looks when it is told to."""

    def __init__(self, *first: Device, device: str = "") -> None:
        self.now, self._seen = 0.0, first
        self.sampler = Sampler(
            lambda: self._seen, device=device, period_s=1e6, clock=lambda: self.now
        )

    def at(self, now: float, *seen: Device) -> None:
        self.now = now
        if seen:
            self._seen = seen
            self.sampler.sample()


@contextmanager
def scene(*first: Device, device: str = "") -> Iterator[Scene]:
    made = Scene(*first, device=device)
    try:
        yield made
    finally:
        made.sampler.close()


def test_mean_and_peak_are_over_the_samples() -> None:
    """T6, W16: by hand; each request from its own start."""
    with scene(device(10)) as one:
        early = one.sampler.watch()
        one.at(1, device(40, used=70))
        late = one.sampler.watch()
        one.at(2, device(10, used=60))
        (use,) = one.sampler.release(early)
        known = DeviceUse(
            name="cpu", total=100, used=60, worker_used=10, worker_mean=20, worker_peak=40
        )
        assert use == known
        assert one.sampler.release(early) == (use,)
        assert one.sampler.release(late)[0].worker_mean == 25
        one.at(3, device(20))
        (use,) = one.sampler.release(one.sampler.watch())
        assert (use.worker_mean, use.worker_peak) == (20, 20)


def test_a_device_that_comes_or_goes_breaks_nothing() -> None:
    """T6: a GPU that appears while a request runs."""
    with scene(device(10)) as one:
        first, second = one.sampler.watch(), one.sampler.watch()
        one.at(1, device(20), device(6, "cuda:0"))
        names = {use.name: use.worker_peak for use in one.sampler.release(first)}
        assert names == {"cpu": 20, "cuda:0": 6}
        one.at(2, device(30))
        assert [use.name for use in one.sampler.release(second)] == ["cpu"]


def test_how_busy_is_weighted_by_time_and_needs_samples_of_most_of_it() -> None:
    """T6, W16: by hand; a request that was soon over does not get what was before it."""
    with scene(device(1, busy=0.9)) as one:
        one.at(1)
        watch = one.sampler.watch()
        one.at(2, device(1, busy=0.5))
        one.at(4, device(1, busy=0.8))
        short = one.sampler.watch()
        one.at(5, device(1, busy=0.2))
        (use,) = one.sampler.release(watch)
        assert (use.busy_mean, use.busy_peak) == (pytest.approx(2.3 / 4), 0.8)
        one.at(7)
        (use,) = one.sampler.release(short)
        assert (use.busy_mean, use.busy_peak) == (None, None)
        (use,) = one.sampler.release(one.sampler.watch())
        assert (use.busy_mean, use.busy_peak) == (None, None)


def joules(uses: Sequence[DeviceUse]) -> float | None:
    return uses[-1].joules


def test_energy_is_shared_by_those_that_ran() -> None:
    """W16: by hand; the shares are the whole, weighted by the time that they ran together."""
    with scene(device(1), device(1, "cuda:0", joules=1000.0, watts=5.0)) as one:
        one.at(10, device(1), device(1, "cuda:0", joules=2000.0))
        first = one.sampler.watch()
        one.at(11)
        second = one.sampler.watch()
        one.at(12, device(1), device(1, "cuda:0", joules=2400.0))
        third = one.sampler.watch()
        one.at(14, device(1), device(1, "cuda:0", joules=3000.0))
        # 200 W over two seconds, of which one is shared by two; then 300 W shared by three.
        assert joules(one.sampler.release(first)) == pytest.approx(200 + 100 + 200)
        assert joules(one.sampler.release(second)) == pytest.approx(100 + 200)
        assert one.sampler.release(third)[0].joules is None
        assert joules(one.sampler.release(third)) == pytest.approx(200)


def test_energy_since_the_last_sample_is_at_its_power() -> None:
    """W16: a request that is over before a sample has a figure too."""
    with scene(device(1, "cuda:0", joules=0.0, watts=100.0)) as one:
        short = one.sampler.watch()
        one.at(1)
        assert joules(one.sampler.release(short)) == pytest.approx(100)
        one.at(2, device(1, "cuda:0", joules=600.0))
        watch = one.sampler.watch()
        one.at(3, device(1, "cuda:0", joules=1000.0))
        one.at(3.5)
        assert joules(one.sampler.release(watch)) == pytest.approx(400 + 200)


def test_energy_without_a_counter_is_the_integral_of_power() -> None:
    """W16: and None where the driver tells neither, or the GPU is somebody else's."""
    with scene(device(1, "cuda:0", watts=100.0), device(1, "cuda:1"), device(0, "cuda:2")) as one:
        watch = one.sampler.watch()
        one.at(
            2,
            device(1, "cuda:0", watts=300.0),
            device(1, "cuda:1"),
            device(0, "cuda:2", joules=5.0, watts=9.0),
        )
        told = [use.joules for use in one.sampler.release(watch)]
        assert told == [pytest.approx(400), None, None]


@pytest.mark.parametrize(
    ("asked", "gpus", "told"),
    [
        ("cpu", 1, [None]),
        ("cuda", 1, [10.0]),
        ("cuda:0", 1, [10.0]),
        ("cuda", 2, [None, None]),
        ("cuda:1", 2, [None, 10.0]),
    ],
)
def test_whose_gpu_it_is_where_no_process_is_seen(
    asked: str, gpus: int, told: list[float | None]
) -> None:
    """T6: as in a container, whose processes have other numbers for the driver."""
    seen = [device(0, f"cuda:{number}", watts=10.0) for number in range(gpus)]
    with scene(*seen, device=asked) as one:
        watch = one.sampler.watch()
        one.at(1, *seen)
        assert [use.joules for use in one.sampler.release(watch)] == told


def test_a_counter_that_begins_anew_takes_nothing_back() -> None:
    """W16: as when the driver is loaded again."""
    with scene(device(1, "cuda:0", joules=500.0)) as one:
        watch = one.sampler.watch()
        one.at(1, device(1, "cuda:0", joules=20.0))
        one.at(2, device(1, "cuda:0", joules=50.0))
        assert joules(one.sampler.release(watch)) == pytest.approx(30)


class Samples:
    """Counts the looks at the devices; each holds one byte more than the last."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[Device, ...]:
        self.count += 1
        return (device(self.count),)


def test_it_samples_while_requests_run_and_rests_when_none_does() -> None:
    """T6: and once at once when one comes after a rest; it ends when it is told to."""
    looks = Samples()
    one = Sampler(looks, period_s=0.02)
    rests = time.monotonic() + 5
    while not one._sleeps and time.monotonic() < rests:
        time.sleep(0.01)
    before = looks.count
    time.sleep(0.1)
    assert looks.count == before
    watch = one.watch()
    deadline = time.monotonic() + 5
    while looks.count < before + 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    (use,) = one.release(watch)
    assert use.worker_peak >= before + 4
    assert before < use.worker_mean < use.worker_peak
    one.close()
    one.close()
    count = looks.count
    time.sleep(0.06)
    assert looks.count == count, "it has ended"


def test_a_long_request_takes_no_more_memory_than_a_short_one() -> None:
    """T6: and what is over takes none."""
    with scene(device(99)) as one:
        watch = one.sampler.watch()
        for step in range(1, 51):
            other = one.sampler.watch()
            one.at(step, device(98 - step))
            one.sampler.release(other)
        assert len(one.sampler._running) == len(watch._sums) == 1
        (use,) = one.sampler.release(watch)
        assert (use.worker_peak, use.worker_mean) == (99, (99 + sum(range(48, 98))) // 51)
        assert not one.sampler._running


async def test_devices_are_looked_at_twice_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T6: never on the way of a token, however many there are; hardly ever without requests."""
    samples = Samples()
    monkeypatch.setattr(sampler, "DeviceReader", lambda: samples)
    async with worker() as one:
        before, began = samples.count, time.monotonic()
        for _ in range(20):
            result = await collect(one.ask(ask("a" * 200)))
            assert result.metrics.devices
        await asyncio.sleep(0.7)
        elapsed = time.monotonic() - began
        assert samples.count - before <= elapsed * 2 + 1
        start = samples.count
        await asyncio.sleep(1.2)
        assert samples.count - start <= 1


def test_a_worker_tells_how_busy_its_process_was() -> None:
    """T6, W16: the share of the processors that this process may use."""
    look, cpus = sampler.DeviceReader(), os.cpu_count() or 1
    look()
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.1:
        sum(range(1000))
    expected = 0.1 / (time.monotonic() - began) / cpus
    busy = look()[0].busy
    assert busy is not None
    assert expected / 3 < busy <= 1


@pytest.mark.parametrize(("leads", "counts"), [(False, True), (True, False)])
def test_a_worker_counts_processes_of_its_engine(leads: bool, counts: bool) -> None:
    """T6: and no other worker, each of which leads a session."""
    command = [sys.executable, "-c", "held = b'x' * (50 << 20); print(flush=True); input()"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # With the processes that other tests have left, which render for workers of this process.
    before = sampler.DeviceReader()()[0].worker_used
    with subprocess.Popen(command, start_new_session=leads, **pipes) as child:
        assert child.stdout
        child.stdout.readline()
        assert (sampler.DeviceReader()()[0].worker_used - before > 50 << 20) == counts
        child.kill()


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


def fake_driver(**changed: Any) -> Any:
    """The driver's library with one GPU."""
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)
    unknown = SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    other = SimpleNamespace(pid=1, usedGpuMemory=100)
    told: dict[str, Any] = {
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=1000, used=300),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [mine, other, unknown],
        "nvmlDeviceGetName": lambda handle: "Mill",
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=42),
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5000,
        "nvmlDeviceGetPowerUsage": lambda handle: 65_500,
        "nvmlSystemGetDriverVersion": lambda: "570.1",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
        "NVMLError": RuntimeError,
    }
    return SimpleNamespace(**{**told, **changed})


def lost(*asked: object) -> Any:
    raise RuntimeError(asked)


def test_a_gpu_tells_what_one_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: through the driver's library, where there is one."""
    monkeypatch.setattr(hardware, "_nvml", fake_driver)
    seen = devices()[1]
    assert seen == Device(name="cuda:0 Mill", kind="cuda", total=1000, used=300, worker_used=7)
    assert seen.key == "cuda:0"
    held = machine.process_memory(os.getpid())
    assert held.keys() == {"cpu", "cuda:0"}
    assert held["cuda:0"] == 7
    monkeypatch.setattr(hardware, "_nvml", lambda: fake_driver(nvmlDeviceGetHandleByIndex=lost))
    assert [device.key for device in devices()] == ["cpu"]


def test_a_gpu_tells_how_busy_it_is_and_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: what the driver does not tell is None, and takes nothing else with it."""
    monkeypatch.setattr(hardware, "_nvml", fake_driver)
    seen = sampler.DeviceReader()()[1]
    assert (seen.busy, seen.joules, seen.watts, seen.energy) == (0.42, 5.0, 65.5, "counter")
    old = fake_driver(nvmlDeviceGetTotalEnergyConsumption=lost, nvmlDeviceGetUtilizationRates=lost)
    monkeypatch.setattr(hardware, "_nvml", lambda: old)
    seen = sampler.DeviceReader()()[1]
    assert (seen.busy, seen.joules, seen.watts, seen.energy) == (None, None, 65.5, "power")
    old.nvmlDeviceGetPowerUsage = lost
    assert sampler.DeviceReader()()[1].energy == "none"
    assert seen.worker_used == 7


def test_the_system_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """W5: OS, CPU, instruction sets, memory, library versions, devices."""
    told = system()
    assert told.cores <= told.threads
    assert told.python.count(".") == 2
    assert told.cpu
    assert "msgspec" in told.libraries
    assert told.devices[0].total > 0
    assert set(told.instruction_sets) <= set(facts._INSTRUCTION_SETS)
    assert (told.driver, told.cuda) == ("", "") or len(told.devices) > 1
    monkeypatch.setattr(hardware, "_nvml", fake_driver)
    told = system()
    assert (told.driver, told.cuda, told.devices[1].energy) == ("570.1", "12.8", "counter")


def test_the_system_names_the_library_of_each_engine() -> None:
    """W5: of all engines that are installed."""
    for about in (engines.about(name) for name in engines.names()):
        if about.requires:
            assert about.requires.replace("_", "-") in facts._LIBRARIES


def test_the_system_as_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """W5: flat, under OpenTelemetry's names; the same whenever it is asked."""
    monkeypatch.setattr(hardware, "_nvml", fake_driver)
    info = system()
    told = machine.attributes(info)
    assert told == machine.attributes(system())
    assert told["os.type"] == sys.platform
    assert told["host.cpu.model.name"] == info.cpu
    assert told["process.runtime.version"] == info.python
    assert told["headrace.memory"] == info.devices[0].total
    assert told["headrace.library.msgspec"] == info.libraries["msgspec"]
    assert told["headrace.gpu.0.name"] == "Mill"
    assert told["headrace.gpu.0.memory"] == 1000
    assert (told["headrace.gpu.driver"], told["headrace.gpu.0.energy"]) == ("570.1", "counter")
    plain = (str, int, float, tuple)
    assert {name: value for name, value in told.items() if not isinstance(value, plain)} == {}


async def test_the_start_of_a_worker_carries_the_system(caplog: pytest.LogCaptureFixture) -> None:
    """W5: the same as `doctor` shows."""
    caplog.set_level("INFO", "headrace.worker")
    async with worker():
        pass
    (start,) = [one for one in caplog.records if one.getMessage() == "headrace.worker.start"]
    assert machine.attributes(vars(start)["data"]["system"]) == machine.attributes(system())


def test_a_machine_without_cpuinfo_has_a_name_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(facts, "_CPUINFO", tmp_path / "nothing")
    assert facts._cpu()[0]
    (tmp_path / "arm").write_text("processor : 0\nFeatures : fp asimd\n")
    monkeypatch.setattr(facts, "_CPUINFO", tmp_path / "arm")
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
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
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
    hardware._cgroups.cache_clear()
    assert devices()[0].total == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/", {"": {"cpu__max": "50000 100000"}}, 1),
        ("0::/a/b", {"a": {"cpu__max": "300000 100000"}, "a/b": {"cpu__max": "max 100000"}}, 3),
        ("0::/a/b", {"a": {"cpu__max": "200000 100000"}, "a/b": {"cpu__max": "700000 1000"}}, 2),
        ("0::/", {"": {"cpu__max": "max 100000"}}, 64),
        ("0::/", {"": {"cpu__max": "nonsense"}}, 64),
        (
            "3:cpu,cpuacct:/docker/x\n4:memory:/y",
            {"cpu": {"cpu__cfs_quota_us": 400000, "cpu__cfs_period_us": 100000}},
            4,
        ),
        (
            "3:cpu,cpuacct:/x",
            {"cpu,cpuacct/x": {"cpu__cfs_quota_us": 150000, "cpu__cfs_period_us": 100000}},
            2,
        ),
        (
            "3:cpu:/x",
            {"cpu/x": {"cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100000}},
            64,
        ),
        ("3:cpuset:/\n0::/", {"unified": {"cpu__max": "5000000 1000000"}}, 5),
    ],
)
def test_a_quota_of_time_limits_the_processors(
    groups: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    files: dict[str, dict[str, object]],
    cpus: int,
) -> None:
    """Issue 12.11: version 2, version 1, and groups above; without one the affinity counts."""
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: 64)
    (tmp_path / "own").write_text(own)
    for folder, content in files.items():
        write(groups / folder, **content)
    assert machine.usable_cpus() == cpus


def test_affinity_and_quota_limit_the_threads_of_engines(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12.11: the smaller one; no set of `tune` has more threads than that."""
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
    assert (machine.usable_cpus(), physical_cores()) == (8, 8)
    (tmp_path / "own").write_text("0::/")
    write(groups, cpu__max="200000 100000")
    hardware._cgroups.cache_clear()
    assert (machine.usable_cpus(), physical_cores()) == (2, 2)
    model = ModelFile(path="", format="gguf")
    sets = llamacpp.tune_options(OpenRequest(model=model))
    assert all(options.get("threads", 0) <= 2 for options in sets)
    machine_id.cache_clear()
    try:
        assert "2 of 32 cores" in machine_id()
    finally:
        machine_id.cache_clear()
