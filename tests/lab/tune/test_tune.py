"""The whole of it, through the program, on a real model and for a very short time."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.programs import headrace

from headrace.cli.app import run
from headrace.core.errors import GenerationFailed, LoadFailed, Unsupported
from headrace.core.events import Delta, Event
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.lab.tune import agreement
from headrace.lab.tune.contender import NO_TIME, make_contender
from headrace.lab.tune.measure import Bound, Shape, Turn, turn
from headrace.lab.tune.tuner import Tuner
from headrace.worker.spec import WorkerSpec
from headrace.worker.worker import Worker

QUICK = ("--seconds", "0", "--rounds", "1")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "PATH": "", "HEADRACE_HOME": str(tmp_path / "home")}


def spec(**options: Any) -> ModelSpec:
    return ModelSpec(name="echo", model="builtin:echo", engine="echo", options=options)


def resolve(spec: ModelSpec, report: object) -> WorkerSpec:
    file = ModelFile(path="", format="none")
    return WorkerSpec(model=spec, file=file, engine=spec.engine or "echo")


def ignore(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_the_real_model_is_measured_and_the_winner_written(
    home: Path,
    smollm2_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 4, Choice: figures, memory, agreement, the limit, and the configuration on request."""
    monkeypatch.setattr(agreement, "PROMPTS", agreement.PROMPTS[:2])
    monkeypatch.setattr(agreement, "_ANSWER", 8)
    config = tmp_path / "headrace.toml"
    config.write_text(f'# Mine.\n[models.small]\nmodel = "{smollm2_path}"\n')
    command = ("tune", "small", "--config", str(config), "--engines", "llamacpp", *QUICK)
    shape = ("--streams", "1,2", "--tokens", "4", "--json", "--write", "throughput")
    # With all of these set, each set of options comes to the same.
    fixed = ("slots=2", "threads=1", "kv_type=bf16", "flash_attention=on", "batch_size=128",
        "weight_type=file", "speculation=off")  # fmt: skip
    options = [word for option in fixed for word in ("-o", option)]
    assert run([*command, *shape, *options]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["reference"].startswith("llamacpp")
    assert found["bandwidth"] > 5e8
    (usual,) = found["trials"]
    assert usual["options"] == {}
    assert usual["fault"] is None
    assert usual["agreement"]["prompts"] == usual["agreement"]["forced"] == 1
    assert usual["agreement"]["compared"] >= 2
    assert usual["memory"]["cpu"] > smollm2_path.stat().st_size
    assert usual["load_s"] > 0
    for one, streams in zip(usual["figures"], (1, 2), strict=True):
        assert one["streams"] == streams
        assert one["tokens_per_s"] > 0
        assert 0 < one["first_token_ms_p50"] <= one["first_token_ms_p99"]
        assert 0 < one["of_limit"] < 1
    written = tomllib.loads(config.read_text())["models"]["small"]
    assert written["engine"] == "llamacpp"
    assert written["options"]["threads"] == 1
    assert config.read_text().startswith("# Mine.\n[models.small]\n")
    assert '+engine = "llamacpp"  # tuned' in told.err
    assert run(["show", str(smollm2_path), "--json"]) == 0
    assert "tuned on" in json.loads(capsys.readouterr().out)["engine_reason"]


def test_the_table_is_for_people(environ: dict[str, str]) -> None:
    done = headrace(environ, "tune", "echo", *QUICK, "--streams", "1,3", "--tokens", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:4] == ["ENGINE", "OPTIONS", "WEIGHTS", "STREAMS"]
    assert lines[2].split()[:4] == ["echo", "-", "-", "1"]
    assert lines[3].split()[0] == "3"
    proposal = (
        r"For throughput: echo, [\d.]+ tokens/s at 3 streams in [\d.]+ .B \(now: as it is\)\."
    )
    assert any(re.fullmatch(proposal, line) for line in lines)
    assert any(re.fullmatch(r"Took \d+ of 300 s\.", line) for line in lines)
    assert "This takes at most 300 s (--budget)" in done.stderr
    assert "Nothing is changed; --write" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--streams", "1,x"), "--streams: 1,x is not like"),
        (("--streams", "0"), "--streams: 0 is not like"),
        (("--engines", "nobody"), "no engine 'nobody'"),
        (("--engines", "llamacpp"), "Engine llamacpp reads gguf, not none"),
    ],
)
def test_what_makes_no_sense_is_refused(
    environ: dict[str, str], flags: tuple[str, ...], words: str
) -> None:
    done = headrace(environ, "tune", "echo", *QUICK, *flags)
    assert done.returncode != 0
    assert words in done.stderr


async def test_a_model_for_something_else_is_refused(tmp_path: Path) -> None:
    file = ModelFile(path="", format="none", task="embed")
    with pytest.raises(Unsupported, match="echo is to embed"):
        await tuned(file, tmp_path).run((), ignore)


def tuned(file: ModelFile, home: Path, **options: Any) -> Tuner:
    shape = Shape(streams=(1, 2), seconds=0, rounds=2, tokens=4)
    budgets = {"cpu": 1 << 32}
    return Tuner(spec(**options), file, resolve, home=home, budgets=budgets, shape=shape)


async def test_who_answers_otherwise_is_measured_but_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 4: an engine that does not agree is not chosen."""
    sets: list[dict[str, Any]] = [
        {"text": "something else"},
        {"fail_load": "no"},
        {"memory": 1 << 40},
    ]
    monkeypatch.setattr("headrace.engines.echo.tune_options", lambda request: sets, raising=False)
    file = ModelFile(path="", format="none")
    found = await tuned(file, tmp_path).run((), ignore)
    usual, other, broken, large = found.trials
    assert (usual.fault, len(usual.figures)) == (None, 2)
    assert other.fault is not None
    assert "of its tokens are the reference's" in other.fault
    assert len(other.figures) == 2
    assert broken.fault == "no"
    assert large.fault == "it does not fit into the memory of cpu"
    assert found.winner("throughput") is usual


async def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of options that comes to the same as one before is not measured again."""
    sets = [{"slots": 1}, {"slots": 2}]
    monkeypatch.setattr("headrace.engines.echo.tune_options", lambda request: sets, raising=False)
    found = await tuned(ModelFile(path="", format="none"), tmp_path, slots=3).run((), ignore)
    assert [one.options for one in found.trials] == [{}]


async def test_a_turn_counts_every_token_of_every_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(spec(tokens_per_second=400), resolve)
    await worker.start()
    try:
        done = await turn(worker, 3, Shape(seconds=0.2, tokens=20), "seed")
        assert done.tokens % 20 == 0
        assert done.tokens >= 3 * 20 * 2
        assert len(done.first_s) == done.tokens // 20
        assert done.rate < 3 * 400 * 1.05
        monkeypatch.setattr("headrace.lab.tune.measure._PATIENCE_S", 0.2)
        slow = await turn(worker, 2, Shape(seconds=0.05, tokens=100_000), "seed")
        assert slow.seconds < 2
        assert 0 < slow.tokens < 1000
        assert slow.cut == "late"
        endless = Shape(seconds=0, tokens=100_000)
        assert (await turn(worker, 2, endless, "seed", Bound(seconds=0.05))).cut == "late"
        few = Shape(seconds=60, tokens=10)
        assert (await turn(worker, 2, few, "seed", Bound(least=1e9))).cut == "slow"
        request = GenerateRequest(prompt="still there")
        assert [event async for event in worker.ask(request)]
    finally:
        await worker.aclose()


@pytest.mark.parametrize("options", [{"load_s": 3600}, {"hang_after": 2}])
async def test_what_does_not_come_to_its_end_is_left_out(options: dict[str, Any]) -> None:
    """Issue 17.2: a load or an answer without an end takes no more than its part of the time."""
    contender = make_contender(spec(), "echo", options, resolve, 2)
    shape = Shape(streams=(1, 2), seconds=0, tokens=50)
    await contender.try_out(shape, {}, 2.0, keep=True)
    assert (contender.fault, contender.left_out) == (None, NO_TIME)
    assert not contender.is_loaded
    assert contender.turns == {}


async def test_a_turn_that_is_cut_counts_though_its_requests_do_not_end() -> None:
    """Issue 17.2: the time of a run may be over while they come to their end."""
    ending, over = asyncio.Event(), asyncio.Event()

    class Slow(Worker):
        async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
            try:
                yield Delta(token_ids=(1,))
                await asyncio.Event().wait()
            finally:
                ending.set()
                await over.wait()

    done, shape = Turn(), Shape(seconds=0, tokens=9)
    cut = asyncio.create_task(turn(Slow(spec(), resolve), 1, shape, "x", Bound(0.05), done))
    await ending.wait()
    cut.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut
    assert (done.cut, done.tokens) == ("late", 1)
    over.set()


async def test_what_a_client_meets_is_not_hidden() -> None:
    worker = Worker(spec(fail_after=3), resolve)
    await worker.start()
    try:
        with pytest.raises(GenerationFailed):
            await turn(worker, 2, Shape(seconds=0, tokens=20), "seed")
    finally:
        await worker.aclose()


async def test_nothing_that_agrees_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = {"cpu": 1}
    shape = Shape(streams=(1,), seconds=0, rounds=1, tokens=2)
    file = ModelFile(path="", format="none")
    one = Tuner(spec(), file, resolve, home=tmp_path, budgets=budgets, shape=shape)
    with pytest.raises(LoadFailed, match="does not fit"):
        await one.run((), ignore)
