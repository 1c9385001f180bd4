from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.models.builders import gguf
from tests.worker.rig import echo, resolve

from headrace.core.model import ModelSpec
from headrace.core.status import Footprint
from headrace.engines import echo as echo_engine
from headrace.engines import llamacpp
from headrace.models.inspect import inspect
from headrace.worker import sizing
from headrace.worker.sizing import Sizing
from headrace.worker.spec import OnProgress, WorkerSpec

PLENTY = {"cpu": 1 << 40}
MIB = 1 << 20


def silent(what: str, done: int, total: int) -> None: ...


class Finder:
    """Resolves every model to one file, and counts how often it was asked."""

    def __init__(self, file: Path) -> None:
        self.count = 0
        self.file = file
        file.write_bytes(gguf())

    def __call__(self, spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        self.count += 1
        return WorkerSpec(model=spec, file=inspect(self.file), engine="llamacpp")


def llama(**fields: Any) -> ModelSpec:
    return ModelSpec(name="x", model="x", **fields)


@pytest.fixture
def finder(tmp_path: Path) -> Finder:
    return Finder(tmp_path / "x.gguf")


@pytest.fixture
def needs(tmp_path: Path) -> Path:
    return tmp_path / "home" / "needs.json"


def test_a_model_is_estimated_until_it_was_loaded(needs: Path) -> None:
    """M2: measured at each load, and remembered for model, engine and options."""
    known = Sizing(resolve, needs, PLENTY)
    before = known.footprint(echo(memory=MIB), silent)
    assert before.how == "estimated"
    assert before.devices["cpu"] > MIB
    assert before.load_s
    assert before.load_s >= 1
    known.remember(echo(memory=MIB), {"cpu": 5 * MIB, "cuda:0": 7}, 0.25)
    for later in (known, Sizing(resolve, needs, PLENTY)):
        after = later.footprint(echo(memory=MIB), silent)
        assert (after.how, after.devices) == ("measured", {"cpu": 5 * MIB, "cuda:0": 7})
        assert after.load_s == 0.25
        assert after.max_running == before.max_running


def test_the_most_memory_and_the_last_time_are_kept(needs: Path) -> None:
    known = Sizing(resolve, needs, PLENTY)
    known.remember(echo(), {"cpu": 50, "cuda:0": 1}, 9.0)
    known.remember(echo(), {"cpu": 40, "cuda:0": 2}, 3.0)
    after = known.footprint(echo(), silent)
    assert (after.devices, after.load_s) == ({"cpu": 50, "cuda:0": 2}, 3.0)


def test_what_a_batch_takes_counts_after_a_load_without_one(
    needs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.8: the estimate of the largest batch is the least that is booked."""
    estimated = Footprint(devices={"cpu": 90}, parts={"batch": 60, "overhead": 30})
    monkeypatch.setattr(echo_engine, "footprint", lambda _: estimated)
    known = Sizing(resolve, needs, PLENTY)
    known.remember(echo(), {"cpu": 40}, 1.0)
    assert known.footprint(echo(), silent).devices == {"cpu": 90}
    known.remember(echo(), {"cpu": 95}, 1.0)
    assert known.footprint(echo(), silent).devices == {"cpu": 95}


@pytest.mark.parametrize(
    "other",
    [{"slots": 3}, {"context_length": 512}, {"max_running": 2}, {"device": "cpu"}, {"memory": 1}],
)
def test_another_way_to_load_it_is_another_need(needs: Path, other: dict[str, Any]) -> None:
    known = Sizing(resolve, needs, PLENTY)
    known.remember(echo(), {"cpu": 50}, 1.0)
    assert known.footprint(echo(**other), silent).how == "estimated"
    assert known.footprint(echo(name="renamed", hang_s=1.0), silent).how == "measured"
    assert Sizing(resolve, needs, {"cpu": 99}).footprint(echo(), silent).how == "estimated"


def test_another_file_under_the_same_name_is_another_need(finder: Finder, needs: Path) -> None:
    known = Sizing(finder, needs, PLENTY)
    known.remember(llama(), {"cpu": 50}, 1.0)
    assert known.footprint(llama(), silent).how == "measured"
    os.utime(finder.file, ns=(1, 1))
    assert known.footprint(llama(), silent).how == "estimated"


def test_a_header_is_read_once(finder: Finder, needs: Path) -> None:
    known = Sizing(finder, needs, PLENTY)
    assert known.resolve(llama(), silent).memory == PLENTY["cpu"]
    known.footprint(llama(), silent)
    known.largest_context(llama(), PLENTY)
    assert finder.count == 1
    os.utime(finder.file, ns=(1, 1))
    known.footprint(llama(), silent)
    assert finder.count == 2
    known.footprint(llama(context_length=512), silent)
    assert finder.count == 3


def test_the_memo_is_bounded(finder: Finder, needs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_MAX_RESOLVED", 2)
    known = Sizing(finder, needs, PLENTY)
    for length in (256, 512, 768, 1024):
        known.resolve(llama(context_length=length), silent)
    assert len(known._resolved) <= 2


def test_the_file_is_bounded_and_the_oldest_go_first(
    needs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "MAX_REMEMBERED", 3)
    known = Sizing(resolve, needs, PLENTY)
    for slots in (1, 2, 3, 4):
        known.remember(echo(slots=slots), {"cpu": slots}, 1.0)
    assert len(json.loads(needs.read_bytes())) == 3
    hows = [known.footprint(echo(slots=slots), silent).how for slots in (1, 2, 3, 4)]
    assert hows == ["estimated", "measured", "measured", "measured"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": {"devices": 3}}', b"\xff\x00"])
def test_a_damaged_file_is_as_none_with_a_warning(
    needs: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    needs.parent.mkdir()
    needs.write_bytes(content)
    known = Sizing(resolve, needs, PLENTY)
    with caplog.at_level(logging.WARNING, "headrace"):
        assert known.footprint(echo(), silent).how == "estimated"
    assert [record.message for record in caplog.records] == ["headrace.sizing.damaged"]
    known.remember(echo(), {"cpu": 50}, 1.0)
    assert known.footprint(echo(), silent).how == "measured"


def test_what_cannot_be_kept_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "home").touch()
    known = Sizing(resolve, tmp_path / "home" / "needs.json", PLENTY)
    known.remember(echo(), {"cpu": 50}, 1.0)
    assert "headrace.sizing.not_kept" in [record.message for record in caplog.records]
    assert known.footprint(echo(), silent).how == "estimated"


def test_many_may_remember_at_once(needs: Path) -> None:
    """Several services of one home do not lose what the others have seen."""

    def remember(slots: int) -> None:
        Sizing(resolve, needs, PLENTY).remember(echo(slots=slots), {"cpu": slots}, 1.0)

    threads = [threading.Thread(target=remember, args=(slots,)) for slots in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads(needs.read_bytes()).values()
    assert sorted(need["devices"]["cpu"] for need in kept) == list(range(1, 9))
    assert [file.name for file in needs.parent.iterdir() if file.suffix == ".json"] == [needs.name]


def test_the_largest_context_is_the_last_that_fits(finder: Finder, needs: Path) -> None:
    """M2, and what `plan` says."""
    known = Sizing(finder, needs, PLENTY)
    options = {"slots": 2}
    assert known.largest_context(llama(options=options), PLENTY) == 2048

    def need(context: int) -> int:
        spec = llama(options=options, context_length=context)
        return known.footprint(spec, silent).devices["cpu"]

    for context in (256, 1024, 1792):
        assert known.largest_context(llama(options=options), {"cpu": need(context)}) == context
        less = {"cpu": need(context) - 1}
        assert known.largest_context(llama(options=options), less) == context - 256
    assert known.largest_context(llama(), {}) == 0


def test_a_measured_model_corrects_the_largest_context(finder: Finder, needs: Path) -> None:
    known = Sizing(finder, needs, PLENTY)
    spec = llama(context_length=512, options={"slots": 1})
    need = known.footprint(spec, silent)
    cell = need.parts["kv_cache"] // 512
    room = {"cpu": need.devices["cpu"] + 512 * cell}
    assert known.largest_context(spec, room) == 1024
    known.remember(spec, {"cpu": need.devices["cpu"] + 256 * cell}, 1.0)
    assert known.largest_context(spec, room) == 768


def test_where_memory_does_not_depend_on_the_context_none_is_largest(needs: Path) -> None:
    assert Sizing(resolve, needs, PLENTY).largest_context(echo(), PLENTY) is None


def test_the_memory_is_that_of_the_device_that_holds_most(
    finder: Finder, needs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is so small that the library would take more of the host.
    monkeypatch.setattr(llamacpp, "_CUDA_DEVICE", 1 << 30)
    known = Sizing(finder, needs, {"cpu": 1 << 30, "cuda:0": 2 << 30})
    assert known.resolve(llama(), silent).memory == 1 << 30
    assert known.resolve(llama(device="cuda"), silent).memory == 2 << 30
    assert Sizing(finder, needs, {}).resolve(llama(), silent).memory is None
    found = known.resolve(llama(device="cuda"), silent)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=WorkerSpec) == found
