"""What each model needs: estimated from its header before the first load, and remembered after."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from headrace import __version__, engines
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint
from headrace.models.transfer import silent, write_atomically
from headrace.worker.spec import OnProgress, Resolve, WorkerSpec, open_request

log = logging.getLogger("headrace.worker")

MAX_REMEMBERED = 1000
_STEP, _MOST = 256, 1 << 24
_MAX_RESOLVED = 256
# Of a load nobody has seen yet: a process and its library, the disk, and memory first written to.
_START_S, _DISK_RATE, _MEMORY_RATE = 1.0, 500e6, 1e9


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What one load took: bytes by device, and seconds. `seen` is Unix time."""

    devices: dict[str, int]
    load_s: float
    seen: float


class _Resolved(msgspec.Struct, frozen=True):
    found: WorkerSpec
    stamp: tuple[int, int]


class Unsized:
    """Knows nothing of what models need, for a pool without a budget."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return that nothing is to be booked."""
        return Footprint(devices={})

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Do nothing."""

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return that it is unknown."""
        return None


class Sizing:
    """Knows what models need. Its methods block and may be called from any thread.

    `path` is the file in which needs are remembered, shared by all services of this home.
    `budgets` is how many bytes models may take of each device.
    """

    def __init__(self, resolve: Resolve, path: Path, budgets: dict[str, int]) -> None:
        self._find = resolve
        self._path = path
        self._budgets = budgets
        self._resolved: dict[bytes, _Resolved] = {}

    def __repr__(self) -> str:
        """Tell where it remembers and what there is."""
        return f"Sizing({str(self._path)!r}, budgets={self._budgets})"

    def resolve(self, spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        """Find the model, with the memory of its device; again only when its file has changed.

        Raises:
            HeadraceError: what the given `resolve` raises, or the header cannot be read.
        """
        key = self._memo(spec)
        known = self._resolved.get(key)
        if known is not None and known.stamp == _stamp(known.found):
            # Two keys are one name in the memo: what is opened is what is asked for now.
            return msgspec.structs.replace(known.found, model=spec)
        found = self._find(spec, on_progress)
        devices = engines.footprint(found.engine, open_request(found)).devices
        # The device with most of it is where its cache is.
        main = max(devices, key=lambda device: devices[device], default="")
        found = msgspec.structs.replace(found, memory=self._budgets.get(main))
        if len(self._resolved) >= _MAX_RESOLVED:
            self._resolved.clear()
        self._resolved[key] = _Resolved(found, _stamp(found))
        return found

    def _memo(self, spec: ModelSpec) -> bytes:
        # A secret among the options is written without being told.
        return msgspec.json.encode((spec, sorted(self._budgets.items())), enc_hook=str)

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return what the model takes: measured if it was loaded so before, estimated if not.

        Raises:
            HeadraceError: as `resolve`.
        """
        found = self.resolve(spec, on_progress)
        estimated = engines.footprint(found.engine, open_request(found))
        estimated = msgspec.structs.replace(estimated, engine=found.engine)
        need = self._read().get(_key(found))
        if need is None:
            return msgspec.structs.replace(estimated, load_s=_load_s(found, estimated))
        # One that once grew beyond the budget may try again: it is not refused for ever.
        most = _larger(estimated.devices, self._budgets)
        devices = {name: min(size, most.get(name, size)) for name, size in need.devices.items()}
        return msgspec.structs.replace(
            estimated, devices=devices, how="measured", load_s=need.load_s
        )

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Keep what a load has really taken; of memory the most that was ever seen.

        What cannot be kept is logged and no error: the next load is estimated once more.
        """
        # As it was when it was loaded: a file that has gone since is not fetched for this.
        known = self._resolved.get(self._memo(spec))
        found = known.found if known else self.resolve(spec, silent)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_name(f".{self._path.name}.lock")):
                needs = self._read()
                old = needs.pop(_key(found), None)
                most = _larger(old.devices if old else {}, devices)
                needs[_key(found)] = Need(devices=most, load_s=load_s, seen=time.time())
                latest = sorted(needs.items(), key=lambda item: item[1].seen)[-MAX_REMEMBERED:]
                write_atomically(self._path, msgspec.json.encode(dict(latest)))
        except OSError as error:
            log.warning("headrace.sizing.not_kept", extra={"data": {"error": str(error)}})

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return the longest context with which the model fits into `budgets`, in tokens.

        It is a multiple of 256, and 0 if none fits; None where memory does not depend on it.

        Raises:
            HeadraceError: as `resolve`.
        """
        found = self.resolve(spec, silent)
        request = open_request(found)
        planned = engines.footprint(found.engine, request)
        if not planned.parts.get("kv_cache"):
            return None
        need = self._read().get(_key(found))
        surplus = _difference(need.devices, planned.devices) if need else {}

        def fits(context: int) -> bool:
            asked = msgspec.structs.replace(request, context_length=context)
            taken = engines.footprint(found.engine, asked).devices
            return all(taken[d] + surplus.get(d, 0) <= budgets.get(d, 0) for d in taken)

        # From the top down: where slots give way to context, a longer one can take less.
        low = (found.file.context_length or _MOST) // _STEP
        high = low + 1
        while low and not fits(low * _STEP):
            low, high = low // 2, low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
        return low * _STEP

    def _read(self) -> dict[str, Need]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Need])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            data = {"path": str(self._path), "error": str(error)}
            log.warning("headrace.sizing.damaged", extra={"data": data})
            return {}


def _key(found: WorkerSpec) -> str:
    spec = found.model
    facts: list[Any] = [
        found.file.path or spec.model,
        found.file.size,
        _stamp(found),
        (found.engine, engines.version(found.engine), __version__),
        sorted(spec.options.items()),
        (spec.context_length, spec.max_running, spec.device, found.memory),
    ]
    return hashlib.sha256(msgspec.json.encode(facts, enc_hook=str)).hexdigest()[:32]


def _stamp(found: WorkerSpec) -> tuple[int, int]:
    """Return size and time of change of the model's file; zeros where there is none."""
    try:
        here = found.file.path if found.file.format != "remote" else ""
        status = Path(here).stat() if here else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


def _load_s(found: WorkerSpec, need: Footprint) -> float:
    if found.file.format == "remote":
        return 0.0
    written = sum(need.devices.values()) - found.file.size
    return _START_S + found.file.size / _DISK_RATE + max(0, written) / _MEMORY_RATE


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {**one, **other}}


def _difference(measured: dict[str, int], estimated: dict[str, int]) -> dict[str, int]:
    return {key: amount - estimated.get(key, 0) for key, amount in measured.items()}
