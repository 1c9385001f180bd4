"""Adapters: each changes the answers of its own requests, and of no others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from headrace.core.errors import UnknownModel
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import Declared, Reply, Subject, check, refusal

_ROUNDS = 3


def _loaded(subject: Subject) -> tuple[str, ...]:
    """Return the adapters that the model was opened with."""
    if not subject.capabilities.adapters:
        raise Declared("It takes no adapters.")
    if not subject.adapters:
        raise Declared("None was loaded; `[models.NAME.adapters]` names some.")
    return subject.adapters


async def _texts(subject: Subject, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {name: (await subject.short(adapter=name)).ids for name in names}


@case("W11")
async def adapters(subject: Subject) -> None:
    """An adapter changes the answer, the model beside it stays, and a prompt is cached for one."""
    names = ("", *_loaded(subject))
    alone = await _texts(subject, names)
    check(len(set(alone.values())) == len(names), f"Equal answers of {', '.join(names)}.")
    # The same prompt, after each other: a cache of another adapter would be seen.
    for _ in range(_ROUNDS):
        for name, ids in reversed((await _texts(subject, names)).items()):
            check(ids == alone[name], f"{name or 'The model'} answers otherwise after others.")


@case("W11")
async def adapters_together(subject: Subject) -> str | None:
    """Requests of different adapters at once have the answers that they have alone."""
    names = ("", *_loaded(subject))
    alone = await _texts(subject, names)

    async def ask(name: str) -> tuple[str, Reply]:
        return name, await subject.short(adapter=name)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(name)) for _ in range(_ROUNDS) for name in names]
    remark = None
    for name, reply in (task.result() for task in tasks):
        if reply.ids != alone[name]:
            remark = f"{name or 'The model'} answers otherwise beside others."
            check(not subject.capabilities.batch_invariant, remark)
            same = {other: _same(reply.ids, ids) for other, ids in alone.items()}
            check(0 < same[name] == max(same.values()), f"{remark} It answers as another does.")
            remark += " It does not declare batch_invariant."
    return remark


def _same(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many of the first tokens are the same."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ids), len(others)))


@case("W11")
async def adapter_unknown(subject: Subject) -> None:
    """An adapter that was not loaded is refused."""
    if subject.is_remote:
        raise Declared("Its models are those of the upstream.")
    request = subject.request(adapter="none-of-this-name", **subject.able(max_tokens=1))
    await refusal(subject.backend.ask(request), UnknownModel)


CASES = (adapters, adapters_together, adapter_unknown)
