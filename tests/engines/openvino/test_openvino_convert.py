"""What OpenVINO is given: as it is, converted, or refused."""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from pathlib import Path

import pytest

from headrace.core.errors import ConfigError, DoesNotFit, LoadFailed
from headrace.core.model import ModelFile
from headrace.engines.base import OpenRequest
from headrace.engines.openvino import (
    conversion,
    footprint,
    plan_cache,
    prepared,
    settled,
)
from headrace.engines.openvino.engine import Engine
from headrace.engines.openvino.vocabulary import without_telemetry
from headrace.models import converted
from headrace.models.inspect import inspect

KV = 23040


def model(**facts: object) -> ModelFile:
    known = {"path": "m", "format": "openvino", "size": 1 << 28, "kv_bytes_per_token": KV}
    return ModelFile(**{**known, **facts})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("quantization", ["Q4_1", "F16", "Q8_0"])
def test_a_gguf_is_refused_with_the_way_out(quantization: str, tmp_path: Path) -> None:
    """The library opens each GGUF for writing, which the process of a model may not."""
    file = model(format="gguf", quantization=quantization, path=str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").touch()
    for attempt in (
        lambda: prepared(file, tmp_path),
        lambda: Engine(OpenRequest(model=file)),
    ):
        with pytest.raises(LoadFailed, match="pull MODEL --for openvino"):
            attempt()


def test_an_ir_is_taken_as_it_is(tmp_path: Path) -> None:
    file = model()
    assert prepared(file, tmp_path) is file


def test_a_failed_conversion_leaves_nothing(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: ModelFile, making: Path) -> None:
        (making / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "_run_conversion", full)
    with pytest.raises(DoesNotFit):
        conversion.convert(inspect(smollm2_path), tmp_path)
    assert [path.suffix for path in (tmp_path / "converted").iterdir()] == [".lock"]


def test_another_file_under_the_same_name_is_another_model(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    names: set[Path] = set()
    for size in (1, 2):
        source.write_bytes(b"x" * size)
        file = model(path=str(source), format="gguf", quantization="Q4_0", size=size)
        names.add(converted.place(file, tmp_path))
    assert len(names) == 2


def test_the_cache_is_cut_to_the_memory() -> None:
    request = OpenRequest(model=model(context_length=8192), memory=64 * 8192 * KV, max_running=32)
    plan = plan_cache(request, settled(request))
    assert (plan.slots, plan.context_length, plan.tokens) == (32, 8192, 16 * 8192)
    scarce = OpenRequest(model=model(context_length=8192), memory=4 * 1024 * KV)
    small = plan_cache(scarce, settled(scarce))
    assert small.context_length == small.tokens == 1024
    assert "cut" in small.notes[0]


def test_the_estimate_adds_up() -> None:
    estimate = footprint(OpenRequest(model=model(context_length=1024), memory=1 << 32))
    assert sum(estimate.devices.values()) == sum(estimate.parts.values())
    assert estimate.parts["kv_cache"] == 32 * 1024 * KV


def test_options_are_settled() -> None:
    plain = settled(OpenRequest(model=model()))
    assert (plain.precision, plain.prefix_cache) == ("auto", False)
    exact = settled(OpenRequest(model=model(), options={"precision": "f32"}))
    assert exact.prefix_cache
    wanted = settled(OpenRequest(model=model(), options={"prefix_cache": True}))
    assert wanted.prefix_cache
    same = settled(OpenRequest(model=model(), repeatable=True))
    assert (same.precision, same.prefix_cache) == ("f32", False)
    asked = OpenRequest(model=model(), repeatable=True, options={"precision": "bf16"})
    assert settled(asked).precision == "bf16"
    with pytest.raises(ConfigError, match="capitals"):
        settled(OpenRequest(model=model(), options={"properties": {"num_streams": 1}}))


def test_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino_telemetry.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    assert import_module("openvino_telemetry")
    without_telemetry()
    with pytest.raises(ImportError):
        import_module("openvino_telemetry")


def test_another_device_is_refused() -> None:
    with pytest.raises(LoadFailed, match="CPU"):
        Engine(OpenRequest(model=model(), device="cuda"))
