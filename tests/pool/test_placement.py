"""Which GPUs a model runs on: one place decides, and the ledger and the process are told the same.

The machine is a fake one: a driver with two GPUs. The processes are real.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.packages import bring_engine
from tests.worker.rig import until

from headrace import engines, machine, runtime
from headrace.config import Settings, load
from headrace.core.device import DeviceSetting, device_text, placements, read_device
from headrace.core.errors import ConfigError, DoesNotFit
from headrace.core.model import ModelFile
from headrace.core.request import GenerateRequest
from headrace.core.sampling import Sampling
from headrace.core.stream import collect
from headrace.engines.base import OpenRequest
from headrace.machine import hardware
from headrace.pool.admin import status_of
from headrace.pool.policy import Evict, Fits, Never, Wait, choose_devices
from headrace.pool.pool import Pool

GIB = 1 << 30

ENGINE = '''
"""An engine that takes memory of GPUs, as far as its estimate goes, and tells where it runs."""
import json, os, sys
from pathlib import Path
import msgspec
from pydantic import Field
from headrace.core.status import Footprint
from headrace.engines import echo
from headrace.engines.base import About, EngineOptions

ABOUT = About(formats=("none",), devices=("cpu", "cuda"), automatic=False, spreads=True)

class Options(EngineOptions):
    gib: int = Field(6, description="Memory of each GPU.")
    split: int = Field(1, description="GPUs.")
    told: str | None = Field(None, description="The folder that is told of each process.")

def footprint(request):
    options = Options(**request.options)
    gpus = request.gpus or tuple(f"cuda:{n}" for n in range(options.split))
    if request.device == "cpu":
        gpus = ()
    return Footprint(devices={"cpu": 1 << 20} | dict.fromkeys(gpus, options.gib << 30))

class Engine(echo.Engine):
    def __init__(self, request):
        options = Options(**request.options)
        names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
        given = {name: os.environ.get(name) for name in names}
        given |= {"device": request.device, "gpus": request.gpus, "memory": request.memory}
        if options.told:
            Path(options.told, str(os.getpid())).write_text(json.dumps(given))
        super().__init__(msgspec.structs.replace(request, options={}))
        kind = "cpu" if request.device == "cpu" else "cuda"
        self.facts = msgspec.structs.replace(self.facts, device=kind)
'''


def driver(count: int = 2, gib: int = 10, used: dict[int, int] | None = None) -> Any:
    """The driver's library with so many GPUs; a UUID for each."""

    def memory(index: int) -> Any:
        return SimpleNamespace(total=gib * GIB, used=(used or {}).get(index, 0) * GIB)

    return SimpleNamespace(
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{'abcdefgh'[index]}1234",
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
        nvmlDeviceGetName=lambda handle: f"Mill {handle}",
        # For a sampler of a worker that another test has just left.
        nvmlDeviceGetUtilizationRates=_unmetered,
        nvmlDeviceGetTotalEnergyConsumption=_unmetered,
        nvmlDeviceGetPowerUsage=_unmetered,
        NVMLError=RuntimeError,
    )


def _unmetered(handle: int) -> Any:
    raise RuntimeError(f"{handle} has no meter.")


@pytest.fixture(autouse=True)
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, and an engine for them; the folder in which it tells."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "_nvml", driver)
    bring_engine("gpu_echo", ENGINE, tmp_path / "site", monkeypatch)
    told = tmp_path / "told"
    told.mkdir()
    return told


def settings(tmp_path: Path, **models: dict[str, Any]) -> Settings:
    lines = ["[server]", "spare = false", "min_residence_s = 0"]
    for name, given in models.items():
        values = {"model": "builtin:echo", "engine": "gpu_echo", **given}
        options = {"told": str(tmp_path / "told"), **values.pop("options", {})}
        lines += [f"[models.{name}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
        lines += [
            f"[models.{name}.options]",
            *(f"{k} = {json.dumps(v)}" for k, v in options.items()),
        ]
    file = tmp_path / "headrace.toml"
    file.write_text("\n".join(lines))
    return load(
        file=file,
        environ={},
        cwd=tmp_path,
        flags={"home": str(tmp_path / "home")},
        known_options=runtime.engine_options(),
    )


def opened(tmp_path: Path, **models: dict[str, Any]) -> Pool:
    known = settings(tmp_path, **models)
    return runtime.open_pool(known, [known.model_spec(name) for name in models])


def told(folder: Path, pid: int | None) -> dict[str, Any]:
    return json.loads((folder / str(pid)).read_text())


async def ask(pool: Pool, model: str) -> Any:
    request = GenerateRequest(model=model, prompt="ab", sampling=Sampling(max_tokens=2))
    return await collect(pool.ask(request))


async def until_loaded(pool: Pool, model: str, count: int) -> Any:
    entry = pool.entry(model)
    pool.loader.ensure_loaded(entry)
    await until(lambda: sum(replica.is_ready for replica in entry.replicas) >= count, 20)
    return status_of(entry)


async def test_replicas_are_spread_over_the_gpus(tmp_path: Path, two: Path) -> None:
    """Issue 11.17: two replicas, each on a GPU of its own, in the ledger and in the process."""
    pool = opened(tmp_path, a={"replicas": 2})
    try:
        status = await until_loaded(pool, "a", 2)
        gpus = [{d for d in replica.memory if d != "cpu"} for replica in status.replicas]
        assert sorted(map(sorted, gpus)) == [["cuda:0"], ["cuda:1"]]
        assert {d.name: d.booked // GIB for d in pool.ledger.status()} == {
            "cpu": 0,
            "cuda:0": 6,
            "cuda:1": 6,
        }
        for replica, gpu in zip(status.replicas, gpus, strict=True):
            given = told(two, replica.pid)
            assert given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            assert {f"cuda:{given['CUDA_VISIBLE_DEVICES']}"} == gpu
            assert given["gpus"] == ["cuda:0"], "the only one that it sees"
            assert given["memory"] == 9 * GIB
        infos = [replica.info for replica in pool.entry("a").replicas]
        assert sorted(info.device for info in infos if info) == ["cuda:0", "cuda:1"]
    finally:
        await pool.aclose()


async def test_a_second_model_takes_the_empty_gpu(tmp_path: Path, two: Path) -> None:
    """Issue 11.17: nothing is evicted while another GPU has room; the third evicts one."""
    pool = opened(tmp_path, a={}, b={}, c={})
    try:
        await ask(pool, "a")
        await ask(pool, "b")
        assert [pool.entry(name).is_ready for name in "ab"] == [True, True]
        await ask(pool, "c")
        assert sum(pool.entry(name).evictions for name in "ab") == 1
    finally:
        await pool.aclose()


@pytest.mark.parametrize(
    ("device", "visible", "gpus", "name"),
    [
        ("cuda:1", "1", ["cuda:0"], "cuda:1"),
        (["cuda:1", "cuda:0"], "1,0", ["cuda:0", "cuda:1"], "cuda:1,cuda:0"),
        (2, "0,1", ["cuda:0", "cuda:1"], "cuda:0,cuda:1"),
        ("cpu", "", [], "cpu"),
    ],
)
async def test_the_device_of_a_model_is_that_of_its_process(
    device: Any, visible: str, gpus: list[str], name: str, tmp_path: Path, two: Path
) -> None:
    """Issue 11.17: a GPU by name, a list, a number, and none."""
    pool = opened(tmp_path, a={"device": device})
    try:
        status = await until_loaded(pool, "a", 1)
        given = told(two, status.replicas[0].pid)
        assert given["CUDA_VISIBLE_DEVICES"] == visible
        assert given["gpus"] == gpus
        assert status.device == name
        assert {d for d in status.memory if d != "cpu"} == {
            d for d in name.split(",") if d != "cpu"
        }
    finally:
        await pool.aclose()


@pytest.mark.parametrize(
    ("setting", "first", "second"),
    [("1", "1", None), ("GPU-b1234,GPU-a", "GPU-b1234", "GPU-a"), ("1,7,0", "1", None)],
)
async def test_gpus_that_the_operator_hides_are_not_used(
    setting: str,
    first: str,
    second: str | None,
    tmp_path: Path,
    two: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 11.17: by number and by UUID; cuda:0 is the first that is visible, as in CUDA."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    names = [device.name for device in machine.devices()][1:]
    assert names == (["cuda:0 Mill 1"] + (["cuda:1 Mill 0"] if second else []))
    pool = opened(tmp_path, a={"replicas": 2})
    try:
        status = await until_loaded(pool, "a", 2 if second else 1)
        seen = {told(two, r.pid)["CUDA_VISIBLE_DEVICES"] for r in status.replicas if r.pid}
        assert seen == {first, second} - {None}
    finally:
        await pool.aclose()


@pytest.mark.parametrize("setting", ["0,GPU-a", "GPU-a,0", "GPU-a,GPU-a1234", "0,00", "0,0"])
def test_a_gpu_with_two_names_is_counted_once(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.17: its memory was booked twice."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [device.name for device in machine.devices()][1:] == ["cuda:0 Mill 0"]


def test_without_a_visible_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("", "-1", "NoDevFiles", "9", "GPU-zz", "GPU-"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        assert [device.key for device in machine.devices()] == ["cpu"]


@pytest.mark.parametrize("device", ["cuda:7", "cuda:0,cuda:2", "3"])
async def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    """Issue 11.17: at the start, by plan, by an update, and by a load."""
    known = settings(tmp_path, a={"device": device}, b={})
    spec = known.model_spec("a")
    with pytest.raises(ConfigError, match=r"a: device: there is no .*cpu, cuda:0, cuda:1"):
        runtime.open_pool(known, [spec])
    with pytest.raises(ConfigError, match="there is no"):
        await runtime.plan(known, spec)
    with pytest.raises(ConfigError, match="there is no"):
        runtime._specify(known, [spec])("b", {"device": device})
    worker = runtime.open_worker(spec, known.config)
    with pytest.raises(ConfigError, match="there is no"):
        await worker.start()
    await worker.aclose()


async def test_engines_refuse_what_they_cannot_use(tmp_path: Path) -> None:
    known = settings(tmp_path, a={})
    spec = known.model_spec("b", {"model": "builtin:echo", "engine": "echo", "device": "cuda:1"})
    with pytest.raises(ConfigError, match="engine echo runs on cpu, not on cuda"):
        await runtime.plan(known, spec)
    wide = known.model_spec(
        "c", {"model": "builtin:echo", "engine": "gpu_echo", "options": {"split": 3}}
    )
    with pytest.raises(ConfigError, match="3 GPUs"):
        await runtime.plan(known, wide)


async def test_a_plan_names_the_device_that_would_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.17: the one with the most free memory, or the one in the settings."""
    monkeypatch.setattr(hardware, "_nvml", lambda: driver(used={0: 2}))
    known = settings(tmp_path, a={}, b={"device": "cuda:0"}, c={"options": {"gib": 11}})
    need = (await runtime.plan(known, known.model_spec("a"))).need
    assert need.devices["cuda:1"] == 6 * GIB
    assert need.choices == ()
    assert "cuda:0" in (await runtime.plan(known, known.model_spec("b"))).need.devices
    assert not (await runtime.plan(known, known.model_spec("c"))).fits


async def test_a_replica_that_is_not_loaded_has_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue 11.17: in the status that `ps` shows, and in the log, once."""
    from headrace.cli.pool import status_text
    from headrace.core.status import PoolStatus

    pool = opened(tmp_path, a={"replicas": 3})
    try:
        await until_loaded(pool, "a", 2)
        await until(lambda: any(replica.reason for replica in pool.entry("a").replicas), 10)
        for _ in range(3):
            await ask(pool, "a")
        status = status_of(pool.entry("a"))
        (reason,) = [replica.reason for replica in status.replicas if replica.reason]
        assert "6.44 GB" in reason
        assert "none of cuda:0, cuda:1" in reason
        shown = status_text(PoolStatus(models=(status,), devices=()), 0.0)
        assert "none of cuda:0, cuda:1" in shown
        logged = [r for r in caplog.records if r.getMessage() == "headrace.pool.not_loaded"]
        assert len(logged) == 1
    finally:
        await pool.aclose()


async def test_a_model_for_no_gpu_says_so(tmp_path: Path) -> None:
    pool = opened(tmp_path, a={"options": {"gib": 11}})
    try:
        with pytest.raises(DoesNotFit, match="It fits on none of cuda:0, cuda:1"):
            await ask(pool, "a")
    finally:
        await pool.aclose()


async def test_what_was_measured_holds_for_every_gpu_of_a_kind(tmp_path: Path) -> None:
    known = settings(tmp_path, a={})
    pool = runtime.open_pool(known, [known.model_spec("a")])
    try:
        await ask(pool, "a")
        await pool.loader.unload(pool.entry("a"), pool.entry("a").replicas[0], "unloaded")
        await until((known.config.home / "measured.json").exists)
        need = pool.loader.sizing.footprint(known.model_spec("a"), lambda *_: None)
        assert need.how == "measured"
        assert [sorted(choice)[1] for choice in need.choices] == ["cuda:0", "cuda:1"]
    finally:
        await pool.aclose()


@pytest.mark.parametrize(
    ("value", "text", "read"),
    [
        ("auto", "auto", DeviceSetting()),
        ("CUDA", "cuda", DeviceSetting("cuda")),
        ("cuda:1", "cuda:1", DeviceSetting("cuda", ("cuda:1",))),
        ([0, 1], "0,1", DeviceSetting("cuda", ("cuda:0", "cuda:1"))),
        ("cuda:0, cuda:3", "cuda:0,cuda:3", DeviceSetting("cuda", ("cuda:0", "cuda:3"))),
        (2, "2", DeviceSetting("cuda", number=2)),
        ("4", "4", DeviceSetting("cuda", number=4)),
    ],
)
def test_the_setting(value: object, text: str, read: DeviceSetting) -> None:
    assert device_text(value) == text
    assert read_device(text) == read


@pytest.mark.parametrize(
    "value", ["cuda:", "cuda:x", "cuda:-1", "0", "cuda:1,cuda:1", "cpu,cuda:0", "65", "", [], "1,"]
)
def test_what_is_no_device(value: object) -> None:
    with pytest.raises(ValueError, match="is no device"):
        device_text(value)


def test_the_sets_of_gpus() -> None:
    known = ["cpu", *(f"cuda:{n}" for n in range(8))]
    assert len(placements(DeviceSetting(), known, 1)) == 8
    assert len(placements(DeviceSetting("cuda", number=2), known, 1)) == 28
    assert len(placements(DeviceSetting(), known, 4)) == 64, "bounded"
    assert placements(DeviceSetting("cuda", ("cuda:5",)), known, 1) == [("cuda:5",)]


def test_the_choice_of_devices() -> None:
    """Free before evicting before waiting; then away from its own replicas; then the emptiest."""
    zero, one = {"cpu": 1, "cuda:0": 5}, {"cpu": 1, "cuda:1": 5}
    free = {"cpu": 9, "cuda:0": 9, "cuda:1": 6}

    def chosen(first: Any, second: Any, crowded: dict[str, int] | None = None) -> int:
        return choose_devices([(zero, first), (one, second)], free, crowded or {})

    assert chosen(Fits(), Fits()) == 0
    assert chosen(Fits(), Fits(), {"cuda:0": 1}) == 1
    assert chosen(Evict(("a",)), Fits()) == 1
    assert chosen(Evict(("a", "b")), Evict(("a",))) == 1
    assert chosen(Wait(), Evict(("a",))) == 1
    assert chosen(Never("cuda:0", 1), Wait()) == 1


def test_every_engine_counts_the_gpus_that_it_was_given(tmp_path: Path) -> None:
    """Issue 11.17: the estimate is for those devices, whatever the engine."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = ModelFile(
        path=str(folder),
        format="safetensors",
        size=4 * GIB,
        quantization="BF16",
        parameters=2 * GIB,
        kv_bytes_per_token=1 << 10,
        context_length=4096,
    )
    for name in ("transformers", "sentence_transformers", "vllm"):
        alone = OpenRequest(model=file, device="cuda:1", gpus=("cuda:1",), memory=9 * GIB)
        devices = engines.footprint(name, alone).devices
        assert devices.keys() == {"cpu", "cuda:1"}, name
        assert devices["cuda:1"] >= 4 * GIB
        if engines.about(name).spreads:
            gpus = ("cuda:1", "cuda:0")
            both = OpenRequest(model=file, device="auto", gpus=gpus, memory=18 * GIB)
            assert engines.footprint(name, both).devices.keys() == {"cpu", *gpus}, name
    wrong = {"tensor_parallel": 3}
    with pytest.raises(ConfigError, match="for 3 GPUs, and the model's device is 1"):
        engines.footprint("vllm", OpenRequest(model=file, gpus=("cuda:1",), options=wrong))
