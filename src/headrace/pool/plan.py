"""What loading a model would need and do, without doing it."""

from __future__ import annotations

import asyncio

from headrace.core.errors import UnknownModel
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint, Plan
from headrace.pool.entry import ModelEntry
from headrace.pool.loader import Loader
from headrace.pool.memory import numbers
from headrace.pool.policy import Evict, Fits, Never, Wait


async def plan_load(loader: Loader, spec: ModelSpec, entry: ModelEntry | None = None) -> Plan:
    """Plan a load; `entry` is the model's, where it is served already.

    Raises:
        UnknownModel: the model is not on this machine, and only its header could tell.
        HeadraceError: it is damaged, or nothing can run it.
    """

    def report(what: str, done: int, total: int) -> None:
        if what.startswith("downloading"):
            raise UnknownModel(f"{spec.model} is not on this machine yet; pull it first.")

    need = await asyncio.to_thread(loader.sizing.footprint, spec, report)
    budgets = dict(loader.memory.ledger.budgets)
    largest = await asyncio.to_thread(loader.sizing.largest_context, spec, budgets)
    up = entry is not None and entry.is_ready
    evict, reason = ((), "It is loaded.") if up else _consequences(loader, spec, need)
    return Plan(
        model=spec.name,
        engine=need.engine or spec.engine or "auto",
        need=need,
        fits=evict is not None,
        loaded=up,
        evict=evict or (),
        largest_context=largest,
        reason=reason,
        devices=loader.memory.ledger.status(),
    )


def _consequences(
    loader: Loader, spec: ModelSpec, need: Footprint
) -> tuple[tuple[str, ...] | None, str]:
    """Return who would have to go, None where even that would not do, and a sentence."""
    if not need.devices:
        return (), "It takes no memory of this machine."
    free = loader.memory.ledger.free()
    has = f"needs {numbers(need.devices)} ({need.how}), {numbers(free)} free"
    # As if it had waited for long enough: who is busy would end his requests and go.
    decision = loader.memory.decide(need.devices, free, waited_s=float("inf"))
    match decision:
        case Fits():
            return (), f"It fits: {has}."
        case Evict(keys) | Wait(close=keys) if keys:
            pairs = [loader.memory.find(key) for key in keys]
            names = tuple(dict.fromkeys(pair[0].spec.name for pair in pairs if pair))
            return names, f"It fits once {', '.join(names)} has gone: {has}."
        case Never():
            return None, loader.memory.refusal(spec.name, need.devices, decision)
        case _:
            return None, f"It does not fit now: {has}."
