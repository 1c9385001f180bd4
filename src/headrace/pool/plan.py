"""What a load would need and do."""

from __future__ import annotations

import asyncio

import msgspec

from headrace.core.errors import UnknownModel
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint, Plan
from headrace.pool.entry import ModelEntry
from headrace.pool.memory import MemoryQueue, Sizing, describe_bytes
from headrace.pool.policy import Evict, Fits, Never, Wait


async def plan_load(
    memory: MemoryQueue, sizing: Sizing, spec: ModelSpec, entry: ModelEntry | None = None
) -> Plan:
    """Return what a load would need and do; `entry` is that of a model that is served.

    Raises:
        UnknownModel: the model is not on this machine.
        HeadraceError: it is damaged, or no engine can run it.
    """

    def report(stage: str, done: int, total: int) -> None:
        if stage.startswith("downloading"):
            raise UnknownModel(f"{spec.model} is not on this machine yet; pull it first.")

    sizing = await asyncio.to_thread(sizing.without_file, spec)
    need = await asyncio.to_thread(sizing.footprint, spec, report)
    budgets = dict(memory.ledger.budgets)
    largest = await asyncio.to_thread(sizing.largest_context, spec, budgets)
    is_ready = entry is not None and entry.is_ready
    need = _placed(memory, need, entry)
    evict, reason = ((), "It is loaded.") if is_ready else _consequences(memory, spec, need)
    return Plan(
        model=spec.name,
        engine=need.engine or spec.engine or "auto",
        need=need,
        fits=evict is not None,
        loaded=is_ready,
        evict=evict or (),
        largest_context=largest,
        reason=reason,
        devices=memory.ledger.status(),
    )


def _placed(memory: MemoryQueue, need: Footprint, entry: ModelEntry | None) -> Footprint:
    """Return a need on the devices that would be chosen after a long wait."""
    free, choices = memory.ledger.free(), need.choices or (need.devices,)
    decisions = [
        (devices, memory.decide(devices, free, waited_s=float("inf"))) for devices in choices
    ]
    place = memory.best(decisions, free, entry)
    return msgspec.structs.replace(need, devices=choices[place], choices=())


def _consequences(
    memory: MemoryQueue, spec: ModelSpec, need: Footprint
) -> tuple[tuple[str, ...] | None, str]:
    """Return the models to evict, None if the model cannot fit, and an explanation."""
    if not need.devices:
        return (), "It takes no memory of this machine."
    free = memory.ledger.free()
    has = f"needs {describe_bytes(need.devices)} ({need.how}), {describe_bytes(free)} free"
    # As after a long wait: busy models finish their requests and are unloaded.
    decision = memory.decide(need.devices, free, waited_s=float("inf"))
    match decision:
        case Fits():
            return (), f"It fits: {has}."
        case Evict(keys) | Wait(close=keys) if keys:
            pairs = [memory.find(key) for key in keys]
            names = tuple(dict.fromkeys(pair[0].spec.name for pair in pairs if pair))
            return names, f"It fits once {', '.join(names)} has gone: {has}."
        case Never():
            return None, memory.refusal(spec.name, need.devices, decision)
        case _:
            return None, f"It does not fit now: {has}."
