"""What was measured is kept for this file on this machine, and proposes an engine."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest

from headrace import runtime
from headrace.core.model import ModelFile
from headrace.engines import measured as record
from headrace.engines import version
from headrace.engines.measured import Figures, Record, Trial, load, proposal, save


def figures(streams: int, rate: float) -> Figures:
    return Figures(
        streams=streams,
        tokens_per_s=rate,
        spread=(rate, rate),
        first_token_ms_p50=1,
        first_token_ms_p99=2,
    )


def trial(engine: str, alone: float, many: float, **more: Any) -> Trial:
    found = (figures(1, alone), figures(32, many))
    return Trial(**{"engine": engine, "version": version(engine), "figures": found, **more})


def run(*trials: Trial) -> Record:
    return Record(
        model="x", source="x", day="2026-11-22", machine="m", streams=(1, 32), trials=trials
    )


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"x")
    return ModelFile(path=str(path), format="gguf")


def test_the_fastest_that_may_be_chosen_wins() -> None:
    found = run(
        trial("llamacpp", 100, 180),
        trial("llamacpp", 90, 200, options={"slots": 32}),
        trial("echo", 900, 900, fault="it only repeats"),
    )
    latency, throughput = found.winner("latency"), found.winner("throughput")
    assert latency is found.trials[0]
    assert throughput is found.trials[1]
    assert run(trial("echo", 9, 9, fault="no")).winner("latency") is None


def test_what_was_left_out_is_not_proposed() -> None:
    """Issue 17.2: it was not compared with the reference, however fast its first turn was."""
    slow = trial("echo", 200, 200, left_out="no time was left for it")
    found = run(trial("llamacpp", 100, 180), slow, trial("echo", 0, 0, left_out="it was slower"))
    assert found.winner("latency") is found.winner("throughput") is found.trials[0]
    assert slow.summary(1) == "200.0 tokens/s at 1 stream"
    assert found.trials[2].summary(1) == "it was slower"
    assert trial("echo", 0, 0).summary(1) == "not measured"


def test_of_those_about_as_fast_the_smallest_wins() -> None:
    found = run(
        trial("openvino", 100, 200, memory={"cpu": 3}),
        trial("llamacpp", 96, 189, memory={"cpu": 2}),
        trial("echo", 94, 100, memory={"cpu": 1}),
    )
    assert found.winner("latency") is found.trials[1]
    assert found.winner("throughput") is found.trials[0]


@pytest.mark.parametrize(
    ("rates", "is_slower"),
    [
        # All five rounds, which chance wins in 3 % of runs.
        ((96, 97, 96, 95, 97), True),
        # One of them is lost, one of eight is not enough.
        ((96, 97, 101, 95, 97), False),
        ((96, 97, 101, 95, 97, 96, 95, 96), True),
        ((97, 103, 96, 102, 97, 104, 95, 98), False),
        # A difference that no one notices.
        ((99.5,) * 8, False),
        # As far off as no noise is.
        ((85, 89), True),
        # Too few rounds to tell: 5 % decide.
        ((96, 96, 96), False),
        ((94, 94, 94), True),
    ],
)
def test_a_difference_beyond_the_noise_of_its_rounds_counts(
    rates: tuple[float, ...], is_slower: bool
) -> None:
    """Issue 17.2: 4.5 % in every round are no tie, and 4.5 % in some are one."""
    best = (100.0,) * len(rates)
    assert record.is_slower(rates, best) is is_slower
    assert not record.is_slower(best, best)
    fast, small = (
        Trial(
            engine=name,
            version=None,
            memory={"cpu": memory},
            figures=(msgspec.structs.replace(figures(1, median(each)), rates=each),),
        )
        for name, memory, each in (("llamacpp", 2, best), ("echo", 1, rates))
    )
    found = msgspec.structs.replace(run(small, fast), streams=(1,))
    assert found.winner("latency") is (fast if is_slower else small)


def test_what_was_measured_is_found_again_until_the_file_changes(
    tmp_path: Path, file: ModelFile
) -> None:
    save(tmp_path / "home", file, run(trial("llamacpp", 100, 180)))
    assert load(tmp_path / "home", file) == run(trial("llamacpp", 100, 180))
    assert "llamacpp 100.0 tokens/s" in proposal(tmp_path / "home", file, "llamacpp")
    Path(file.path).write_bytes(b"another")
    assert load(tmp_path / "home", file) is None
    assert proposal(tmp_path / "nowhere", file, "llamacpp") == ""


def test_another_machine_knows_nothing(
    tmp_path: Path, file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, file, run(trial("llamacpp", 100, 180)))
    monkeypatch.setattr(record, "machine_id", lambda: "another")
    assert load(tmp_path, file) is None


def test_a_proposal_has_speed_and_memory_and_is_for_these_versions(
    tmp_path: Path, file: ModelFile
) -> None:
    """Issue 12.18: memory is part of it. An engine that does not agree is named, not proposed."""
    usual = trial("llamacpp", 100, 180, memory={"cpu": 950_000_000})
    large = trial("echo", 500, 900, memory={"cpu": 5_900_000_000}, options={"slots": 2})
    save(tmp_path, file, run(usual, large, trial("echo", 9999, 1, fault="it differs")))
    assert proposal(tmp_path, file, "llamacpp") == (
        "; tuned on 2026-11-22: llamacpp 100.0 tokens/s at 1 stream in 950.0 MB, echo slots=2 "
        "500.0 tokens/s at 1 stream in 5.9 GB (`headrace tune --write latency`)"
    )
    assert proposal(tmp_path, file, "openvino").startswith("; tuned on 2026-11-22: echo slots=2")
    save(tmp_path, file, run(trial("llamacpp", 1, 1, fault="it differs"), large))
    assert ": llamacpp it differs, echo" in proposal(tmp_path, file, "llamacpp")
    save(tmp_path, file, run(trial("llamacpp", 100, 180, version="0.1")))
    assert proposal(tmp_path, file, "llamacpp") == ""


def test_a_damaged_file_is_as_if_there_were_none(tmp_path: Path, file: ModelFile) -> None:
    (tmp_path / record.FILE_NAME).write_text("{")
    assert load(tmp_path, file) is None
    save(tmp_path, file, run())
    assert load(tmp_path, file) == run()


def test_show_says_what_was_measured(home: Path, smollm2_path: Path) -> None:
    """W2: the reason is a sentence that `show` and `ps` tell. Issue 12.18: nothing else changes."""
    settings = runtime.load_settings()
    spec = settings.model_spec(str(smollm2_path), {"engine": "auto", "device": "cpu"})
    assert spec.engine is None
    before = runtime.describe(spec, settings.config)
    assert before.engine == "llamacpp"
    assert before.engine_reason.startswith("gguf on cpu: llamacpp")
    file = runtime.resolver(settings.config)(spec, lambda what, done, total: None).file
    usual, faster = trial("llamacpp", 100, 180), trial("echo", 500, 900)
    save(settings.config.home, file, run(usual, faster))
    after = runtime.describe(spec, settings.config)
    assert after.engine == "llamacpp"
    assert after.engine_reason.removeprefix(before.engine_reason) == (
        "; tuned on 2026-11-22: llamacpp 100.0 tokens/s at 1 stream, echo 500.0 tokens/s at "
        "1 stream (`headrace tune --write latency`)"
    )
    save(settings.config.home, file, run(trial("llamacpp", 1, 1, fault="it differs"), faster))
    assert runtime.describe(spec, settings.config).engine == "llamacpp"


def test_auto_is_as_if_no_engine_were_named(tmp_path: Path) -> None:
    """Issue 4, Choice: in the file, as a flag, and with options of whichever engine knows them."""
    path = tmp_path / "headrace.toml"
    path.write_text('[models.x]\nengine = "auto"\noptions = { slots = 2 }\n')
    spec = runtime.load_settings(file=path).model_spec("x")
    assert (spec.engine, spec.options) == (None, {"slots": 2})
    flags = {"engine": "auto", "options": {"slots": "3"}}
    spec = runtime.load_settings(flags=flags).model_spec("y")
    assert (spec.engine, spec.options) == (None, {"slots": 3})
