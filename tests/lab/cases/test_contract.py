"""Every engine, behind every Backend, keeps the contract: `headrace.contract` holds the cases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from tests.conftest import MODEL_HOME
from tests.lab.cases.samples import (
    ADAPTERS,
    AUDIO,
    SAMPLES,
    WITH_ADAPTERS,
    Sample,
    without_a_sample,
)

from headrace import runtime
from headrace.core.model import Task
from headrace.lab import cases as contract
from headrace.lab.cases import CASES, Case, Kind, Outcome, Subject


@dataclass
class Opened:
    sample: Sample
    subject: Subject


def _marks(sample: Sample) -> list[pytest.MarkDecorator]:
    return [pytest.mark.engines] * sample.heavy + [pytest.mark.slow] * sample.slow


def every(task: Task) -> pytest.MarkDecorator:
    """Each sample of the task, behind each Backend, one after the other."""
    values = [
        pytest.param((sample, kind), id=f"{sample.title}-{kind}", marks=_marks(sample))
        for sample in SAMPLES
        for kind in sample.kinds
        if sample.task == task
    ]
    return pytest.mark.parametrize("opened", values, indirect=True, scope="module")


def cases(task: Task) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [pytest.param(one, id=one.name) for one in CASES if one.task in (None, task)]
    )


@pytest.fixture(scope="module")
async def opened(request: pytest.FixtureRequest, smollm2_path: Path) -> AsyncIterator[Opened]:
    sample: Sample
    kind: Kind
    sample, kind = request.param
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(MODEL_HOME)})
    async with sample.at(smollm2_path) as (reference, found):
        more = {"adapters": found.pop("adapters")} if "adapters" in found else {}
        options = {**sample.options, **found}
        given = {"engine": sample.engine, "options": options, **sample.settings, **more}
        spec = settings.model_spec(reference, given)
        if sample.task != "generate":
            spec = msgspec.structs.replace(spec, task=sample.task)
        async with contract.opened(sample.engine, spec, settings, kind) as subject:
            yield Opened(sample, subject)


@every("generate")
@cases("generate")
async def test_generation(opened: Opened, case: Case) -> None:
    """Issue 4, shown 1: a case is held, or refused as the engine declares it."""
    await hold(opened, case)


@every("embed")
@cases("embed")
async def test_embeddings(opened: Opened, case: Case) -> None:
    """W23: likewise."""
    await hold(opened, case)


@every("rerank")
@cases("rerank")
async def test_rerank(opened: Opened, case: Case) -> None:
    """W23: likewise."""
    await hold(opened, case)


async def hold(opened: Opened, case: Case) -> None:
    outcome: Outcome = await contract.examine(case, opened.subject)
    expected = "ok"
    # A remote model's adapters are names of the upstream.
    of_none = ADAPTERS if opened.subject.is_remote else WITH_ADAPTERS
    without = frozenset[str]() if opened.subject.adapters else of_none
    without |= frozenset() if opened.sample.hears else AUDIO
    if case.name in opened.sample.refused | without:
        expected = "refused"
    elif case.name in opened.sample.reported:
        # Company changes an answer now and then, not always.
        expected = outcome.result if outcome.result == "reported" else "ok"
    assert outcome.result == expected, outcome.why


@pytest.mark.engines
def test_every_engine_has_a_sample() -> None:
    """Issue 4: no engine that could run here is left out."""
    assert without_a_sample() == set()
