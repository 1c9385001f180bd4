"""Changes of a model's adapters: checked first, and made by the loaded workers where they can."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Mapping

import msgspec

from headrace.core.errors import (
    ConfigError,
    DoesNotFit,
    Draining,
    LoadFailed,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.model import ModelSpec, needs_new_worker
from headrace.core.status import Footprint
from headrace.machine import HOST
from headrace.pool.entry import ModelEntry
from headrace.pool.ledger import Ledger, named, to_book
from headrace.pool.loader import Loader
from headrace.pool.memory import Unwanted, describe_bytes
from headrace.pool.replica import Replica
from headrace.pool.worker import PooledWorker

_PART = "adapters"


async def check_adapters(loader: Loader, old: ModelSpec, new: ModelSpec) -> None:
    """Check that adapters which a change adds go with the model, before a worker has to have them.

    Raises:
        ConfigError: one does not, or the budget of memory is too small; with the reason.
        HeadraceError: a download failed.
    """
    if not new.adapters or new.adapters == old.adapters:
        return
    try:
        need = await asyncio.to_thread(loader.sizing.footprint, new, _report)
    except LoadFailed as error:
        raise ConfigError(error.message, param="adapters") from error
    budgets, choices = loader.memory.ledger.budgets, need.choices or (need.devices,)
    if not any(_fits(devices, budgets) for devices in choices):
        known = {device: budgets[device] for device in need.devices if device in budgets}
        raise ConfigError(
            f"With these adapters {new.name} would need {describe_bytes(need.devices)}, and the "
            f"budget is {describe_bytes(known)}.",
            param="adapters",
        )


async def adapted(loader: Loader, entry: ModelEntry, spec: ModelSpec) -> bool:
    """Change the adapters of loaded workers to those of `spec`; return False if some cannot.

    They can if the adapters are all that a worker notices of the change, and there is memory for
    them. What was changed is changed back then, and after an error.

    Raises:
        ConfigError: an engine refuses one.
    """
    old, replicas = entry.spec, [replica for replica in entry.replicas if not replica.is_empty]
    if not _is_of_adapters(old, spec):
        return False
    if not replicas or not all(replica.takes_requests for replica in replicas):
        return False
    need = await asyncio.to_thread(loader.sizing.footprint, spec, _report)
    ledger, before = loader.memory.ledger, dict[Replica, Footprint | None]()
    try:
        for replica in replicas:
            before[replica] = replica.footprint
            if not await _change(ledger, replica, spec, need):
                break
        else:
            return True
    except WorkerDied:
        pass
    except BaseException as error:
        await _undo(ledger, before, old)
        if isinstance(error, LoadFailed | OutOfMemory):
            raise ConfigError(error.message, param="adapters", detail=error.detail) from error
        raise
    await _undo(ledger, before, old)
    return False


def goes_ahead(entry: ModelEntry, spec: ModelSpec) -> bool:
    """Whether the old workers can serve until the new ones are loaded: only adapters differ."""
    return entry.is_ready and spec.enabled and _is_of_adapters(entry.spec, spec)


async def load_ahead(loader: Loader, entry: ModelEntry, spec: ModelSpec) -> None:
    """Load workers with other adapters beside those that serve, as `entry.coming`.

    They are as many as there is free memory for.

    Raises:
        ConfigError: one could not be loaded.
    """
    try:
        for replica in entry.new_replicas(spec):
            entry.coming.append(replica)
            if not await _is_loaded(loader, entry, replica):
                entry.coming.remove(replica)
                return
    except BaseException as error:
        give_up(loader, entry)
        if isinstance(error, LoadFailed | OutOfMemory | WorkerDied):
            raise ConfigError(error.message, param="adapters", detail=error.detail) from error
        raise


def give_up(loader: Loader, entry: ModelEntry) -> None:
    """Unload the replicas that were to come."""
    coming, entry.coming = entry.coming, []
    entry.retired.update(replica for replica in coming if not replica.is_empty)
    loader.unload_idle(entry)


async def _is_loaded(loader: Loader, entry: ModelEntry, replica: Replica) -> bool:
    work = loader.load(entry, replica, may_evict=False)
    loading = asyncio.create_task(work, name=f"load {replica.key}")
    replica.begin_loading(loading)
    try:
        await asyncio.wait({loading})
        if loading.cancelled():
            raise Draining(f"{entry.spec.name}: the load of its other adapters was given up.")
        await loading
    except (Unwanted, DoesNotFit):
        return False
    finally:
        loading.cancel()
        await asyncio.wait({loading})
        replica.loading_ended()
        loader.memory.notify()
    return True


async def _undo(ledger: Ledger, before: Mapping[Replica, Footprint | None], old: ModelSpec) -> None:
    """Let workers have their old adapters. One that took too long may change only now."""
    for replica, had in before.items():
        replica.configure(old)
        # It ends, or is replaced.
        with contextlib.suppress(LoadFailed, OutOfMemory, WorkerDied):
            if had is not None and (worker := replica.worker) is not None:
                await worker.adapt(replica.placed_spec)
                await _settle(ledger, replica, worker, had)


def _is_of_adapters(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether the adapters are all that a worker notices of a change."""
    others = msgspec.structs.replace(old, adapters=new.adapters)
    return needs_new_worker(old, new) and not needs_new_worker(others, new)


async def _change(ledger: Ledger, replica: Replica, spec: ModelSpec, need: Footprint) -> bool:
    """Change the adapters of a worker, with memory for what is new; return False if it cannot."""
    old, worker, had = replica.spec, replica.worker, replica.footprint
    if worker is None or had is None:
        return False
    size = need.parts.get(_PART, 0)
    more = _spread(size - had.parts.get(_PART, 0), had.devices)
    with _booked(ledger, f"{replica.key} {_PART}", more) as is_booked:
        if not is_booked:
            return False
        replica.configure(spec)
        done = False
        try:
            done = await worker.adapt(replica.placed_spec)
        finally:
            if not done:
                replica.configure(old)
        if done:
            devices = {name: held + more.get(name, 0) for name, held in had.devices.items()}
            parts = {**had.parts, _PART: size}
            has = msgspec.structs.replace(had, devices=devices, parts=parts)
            await _settle(ledger, replica, worker, has)
    return done


async def _settle(
    ledger: Ledger, replica: Replica, worker: PooledWorker, estimate: Footprint
) -> None:
    """Book what a worker holds now, if it is still that of the replica."""
    held = named(await worker.memory(), estimate.devices)
    if replica.worker is worker and replica.is_ready:
        replica.estimated(estimate)
        replica.grown(held)
        ledger.settle(replica.key, to_book(replica.footprint, replica.memory))


def _spread(size: int, devices: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes by device of adapters, which are where the layers of the model are."""
    gpus = [device for device in devices if device != HOST]
    places = gpus or [*devices]
    return {device: size // len(places) for device in places}


def _fits(need: Mapping[str, int], room: Mapping[str, int]) -> bool:
    """Whether there is room for a need, of devices that have a budget."""
    return all(amount <= room.get(device, amount) for device, amount in need.items())


@contextlib.contextmanager
def _booked(ledger: Ledger, key: str, more: Mapping[str, int]) -> Generator[bool]:
    """Book memory for this context, if it is free."""
    if not _fits(more, ledger.free()):
        yield False
        return
    ledger.book(key, {device: max(0, amount) for device, amount in more.items()})
    try:
        yield True
    finally:
        ledger.release(key)


def _report(stage: str, done: int, total: int) -> None:
    """Report nothing: no client waits for it."""
