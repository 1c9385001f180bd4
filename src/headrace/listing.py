"""The library with what each model needs on this machine, for the command line and the API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from headrace import roofline
from headrace.core.errors import LoadFailed
from headrace.core.library import LibraryEntry, LibraryFilter, LibraryModel
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint, Plan
from headrace.machine import HOST
from headrace.models.library import current
from headrace.models.store import Store
from headrace.pool.loader import Loader
from headrace.pool.plan import plan_load

_TOKENS = 1000
"""Of prompt and answer, for the guess of a speed."""


async def list_library(
    loader: Loader,
    home: Path,
    specify: Callable[[str], ModelSpec],
    wanted: LibraryFilter,
    rate: Callable[[Path], float | None] = roofline.known_bandwidth,
) -> list[LibraryEntry]:
    """Return the models of the library that match, each with its plan beside what is loaded now.

    `rate` returns the bytes/s of the memory, on a thread.

    Raises:
        HeadraceError: no engine can run a GGUF file, or the library's file is damaged.
    """
    models, stored = await asyncio.to_thread(_matching, home, wanted)
    speed = await asyncio.to_thread(rate, home) if models else None
    entries = [
        _entry(model, await _plan(loader, specify(model.name)), speed, model.reference in stored)
        for model in models
    ]
    return [entry for entry in entries if entry.fits or not wanted.fits]


def _matching(home: Path, wanted: LibraryFilter) -> tuple[list[LibraryModel], set[str]]:
    words = wanted.q.split()
    models = [
        model for model in current() if model.matches(words) and wanted.task in (None, model.task)
    ]
    return models, {stored.reference for stored in Store(home).list()}


async def _plan(loader: Loader, spec: ModelSpec) -> Plan:
    try:
        return await plan_load(loader.memory, loader.sizing, spec)
    except LoadFailed as error:
        # One damaged file is no reason to show none of the others.
        return Plan(
            model=spec.name,
            engine="auto",
            need=Footprint(devices={}),
            fits=False,
            reason=error.message,
        )


def _entry(model: LibraryModel, plan: Plan, rate: float | None, stored: bool) -> LibraryEntry:
    return LibraryEntry(
        **msgspec.structs.asdict(model),
        needs=plan.need.devices,
        fits=plan.fits,
        reason=plan.reason,
        largest_context=plan.largest_context,
        tokens_per_second=_speed(model, plan, rate),
        stored=stored,
    )


def _speed(model: LibraryModel, plan: Plan, rate: float | None) -> float | None:
    """Return the most tokens/s of one stream on the CPU; the rate of a GPU is not measured."""
    is_on_cpu = model.task == "generate" and set(plan.need.devices) == {HOST}
    if rate is None or not is_on_cpu or not plan.fits:
        return None
    read = model.size * model.active // model.parameters
    return roofline.limit(msgspec.structs.replace(model.file, size=read), 1, _TOKENS, rate)
