"""Issue 16.1: what `bench` and `tune` have measured is kept, for the plots of the console."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from headrace import measurements
from headrace.core.measurement import Curve, Point
from headrace.core.model import ModelFile
from headrace.engines import measured
from headrace.engines.measured import Figures, Record, Trial


def curve(number: int) -> Curve:
    points = (Point(load="4 clients", tokens_per_s=float(number), first_token_p50_ms=3.5),)
    return Curve(kind="bench", model="m", title=str(number), time="2026-11-27", points=points)


def test_the_newest_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "MAX_RUNS", 3)
    home = tmp_path / "home"
    assert measurements.read(home) == []
    for number in range(5):
        measurements.keep(home, curve(number))
    assert measurements.read(home) == [curve(4), curve(3), curve(2)]
    assert (home / measurements.FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / measurements.FILE_NAME).write_text('[{"kind": "bench"')
    assert measurements.read(tmp_path) == []
    measurements.keep(tmp_path, curve(1))
    assert measurements.read(tmp_path) == [curve(1)]


def test_a_run_of_tune_has_a_curve_for_each_engine(tmp_path: Path) -> None:
    figures = tuple(
        Figures(
            streams=streams,
            tokens_per_s=10.0 * streams,
            spread=(1, 2),
            first_token_ms_p50=5,
            first_token_ms_p99=9,
        )
        for streams in (1, 8)
    )
    trials = (
        Trial(engine="llamacpp", version="1", memory={"cpu": 7}, figures=figures),
        Trial(engine="openvino", version="1", options={"threads": 2}, fault="it did not load"),
    )
    record = Record(model="m", source="s", day="2026-11-27", machine="here", trials=trials)
    measured.save(tmp_path, ModelFile(path="", format="gguf"), record)
    first, second = measurements.read(tmp_path)
    assert [point.load for point in first.points] == ["1 stream", "8 streams"]
    assert (first.title, first.memory, first.points[1].tokens_per_s) == ("llamacpp", 7, 80)
    assert (second.title, second.fault) == ("openvino threads=2", "it did not load")
    assert msgspec.json.decode(msgspec.json.encode(first), type=Curve) == first
