"""How fast the memory is, and what that allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import roofline
from headrace.core.model import ModelFile

MODEL = ModelFile(path="x", format="gguf", size=100_000_000, kv_bytes_per_token=20_000)


def test_a_step_reads_the_weights_once_and_every_cache() -> None:
    assert roofline.bytes_per_step(MODEL, 1, 100) == 102_000_000
    assert roofline.bytes_per_step(MODEL, 32, 100) == 164_000_000
    assert roofline.limit(MODEL, 32, 100, 16.4e9) == 32 * 100
    assert roofline.limit(ModelFile(path="", format="none"), 1, 100, 1e9) is None


def test_memory_is_read_at_a_speed_that_memory_has() -> None:
    """A page of zeros that is always in the cache, or a read that stops early, would show."""
    alone = roofline.read_bandwidth(1, size=128 << 20, passes=2)
    assert 0.5e9 < alone < 2e12


def test_the_best_that_was_seen_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([10e9, 20e9, 5e9])
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads: next(found))
    assert [roofline.bandwidth(tmp_path / "home") for _ in range(3)] == [10e9, 20e9, 20e9]
    (tmp_path / "home" / roofline.FILE_NAME).write_text("damaged")
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads: 1e9)
    assert roofline.bandwidth(tmp_path / "home") == 1e9
    monkeypatch.setattr(roofline, "machine_id", lambda: "another machine")
    monkeypatch.setattr(roofline, "read_bandwidth", lambda threads: 2e8)
    assert roofline.bandwidth(tmp_path / "home") == 2e8
