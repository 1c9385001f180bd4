"""The contract of a Backend, kept by a front with two nodes in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.cluster.rig import front, node, until
from tests.conftest import MODEL_HOME
from tests.lab.cases.samples import FEW

from headrace import runtime
from headrace.cluster.local import NodePoolAdmin
from headrace.cluster.pool import ClusterPool
from headrace.core.backend import Backend
from headrace.core.model import ModelSpec, Task
from headrace.lab import cases as contract
from headrace.lab.cases import CASES, Case, Outcome, Subject
from headrace.pool.pool import Pool
from headrace.pool.state import StateFile

SAMPLES: dict[str, tuple[Task, dict[str, Any]]] = {
    "generate": ("generate", {"tokens_per_second": 200}),
    "embed": ("embed", {"dimensions": 8}),
    "rerank": ("rerank", {}),
}


def admin_of(pool: Pool) -> NodePoolAdmin:
    def refuse(*_: object) -> Any:
        raise AssertionError("no test changes settings")

    return NodePoolAdmin(pool, specify=refuse, state=StateFile(None), reread=refuse)


@asynccontextmanager
async def cluster(spec: ModelSpec) -> AsyncGenerator[ClusterPool]:
    """Two nodes that have loaded the model, behind a front."""
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(MODEL_HOME)})
    async with AsyncExitStack() as held:
        addresses = []
        for name in ("a", "b"):
            pool = runtime.open_pool(settings, [spec], is_node=True)
            await pool.start()
            held.push_async_callback(pool.aclose)
            _, address = await held.enter_async_context(node(name, pool, admin_of(pool)))
            addresses.append(address)
        backend = await held.enter_async_context(front(addresses))
        await until(lambda: len(backend.view.ready(spec.name)) == 2)
        yield backend


@pytest.fixture(scope="module")
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    task, options = SAMPLES[request.param]
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(MODEL_HOME)})
    given = {"options": options, "replicas": 2, "context_length": 4096}
    spec = settings.model_spec("echo", given)
    spec = msgspec.structs.replace(spec, task=None if task == "generate" else task)

    def reopen(**changes: Any) -> AbstractAsyncContextManager[Backend]:
        return cluster(msgspec.structs.replace(spec, **changes))

    async with AsyncExitStack() as held:
        backend = await held.enter_async_context(reopen())
        yield Subject("echo", "pool", backend, reopen, held)


QUICK = (FEW | {"metadata_is_complete", "greedy_repeats"}) - {"close_gives_everything_back"}
"""What a front could change; the rest is the engine's, and takes a minute."""


def every() -> list[Any]:
    return [
        pytest.param(
            name,
            case,
            id=f"{name}-{case.name}",
            marks=() if case.name in QUICK and name == "generate" else pytest.mark.slow,
        )
        for name, (task, _) in SAMPLES.items()
        for case in CASES
        if case.task in (None, task)
    ]


@pytest.mark.parametrize(("subject", "case"), every(), indirect=["subject"], scope="module")
async def test_the_contract(subject: Subject, case: Case) -> None:
    """Issue 15, shown 1: each case is held, or refused as the engine declares it."""
    outcome: Outcome = await contract.examine(case, subject)
    assert outcome.result in ("ok", "refused"), outcome.why
