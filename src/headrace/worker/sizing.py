"""The memory each model needs: estimated from its header, and measured after the first load."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from headrace import __version__, engines
from headrace.core.device import placements, read_device
from headrace.core.model import ModelSpec, PlacedSpec
from headrace.core.private import FILE_MODE, private_folder, write_atomically
from headrace.core.status import Footprint
from headrace.machine import HOST
from headrace.models.transfer import silent
from headrace.worker.spec import OnProgress, Resolve, WorkerSpec, open_request

log = logging.getLogger("headrace.worker")

MAX_REMEMBERED = 1000
_STEP, _MOST = 256, 1 << 24
_MAX_RESOLVED = 256
# Of a first load: start of the process and its library, rate of the disk, rate of new memory.
_START_S, _DISK_RATE, _MEMORY_RATE = 1.0, 500e6, 1e9


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one load: bytes by device, and seconds. `seen` is Unix time."""

    devices: dict[str, int]
    load_s: float
    seen: float


_Stamp = tuple[int, ...]


class _Resolved(msgspec.Struct, frozen=True):
    worker_spec: WorkerSpec
    stamp: _Stamp


class Unsized:
    """A Sizing without estimates, for a pool without a budget."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return an empty footprint."""
        return Footprint(devices={})

    def without_file(self, spec: ModelSpec) -> Unsized:
        """Return itself."""
        return self

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Do nothing."""

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return None: it is unknown."""
        return None


class Sizing:
    """Estimates and remembers what models need. Methods block, and may be called on any thread.

    `path` is the file of measurements, shared by all services of this home. `budgets` is how many
    bytes models may take of each device. `describe` returns what is known of a model that is not on
    this machine, None if nothing is.
    """

    def __init__(
        self,
        resolve: Resolve,
        path: Path,
        budgets: dict[str, int],
        describe: Callable[[ModelSpec], WorkerSpec | None] | None = None,
    ) -> None:
        self._find = resolve
        self._describe = describe
        self._path = path
        self._budgets = budgets
        self._resolved: dict[bytes, _Resolved] = {}

    def __repr__(self) -> str:
        """Describe the file and the budgets."""
        return f"Sizing({str(self._path)!r}, budgets={self._budgets})"

    def without_file(self, spec: ModelSpec) -> Sizing:
        """Return estimates of a model that is not on this machine; of any other, itself.

        Raises:
            HeadraceError: no engine can run it.
        """
        known = self._describe(spec) if self._describe is not None else None
        if known is None:
            return self

        def describe(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
            del on_progress  # nothing is downloaded
            return msgspec.structs.replace(known, model=spec)

        return Sizing(describe, self._path, self._budgets)

    def resolve(self, spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        """Resolve the model, with the budget of its device; cached until its file changes.

        Raises:
            HeadraceError: from the `resolve` of the constructor, or the header cannot be read.
        """
        key = self._memo_key(spec)
        known = self._resolved.get(key)
        if known is not None and known.stamp == _stamp(known.worker_spec):
            # Specifications that differ in a secret alone share a key: use the current one.
            return msgspec.structs.replace(known.worker_spec, model=spec)
        worker_spec = self._find(spec, on_progress)
        devices = engines.footprint(worker_spec.engine, open_request(worker_spec)).devices
        worker_spec = msgspec.structs.replace(
            worker_spec,
            memory=self._memory(worker_spec, devices),
            booked=devices.get(HOST) if set(devices) <= {HOST} else None,
        )
        if len(self._resolved) >= _MAX_RESOLVED:
            self._resolved.clear()
        self._resolved[key] = _Resolved(worker_spec, _stamp(worker_spec))
        return worker_spec

    def _memory(self, worker_spec: WorkerSpec, devices: dict[str, int]) -> int | None:
        """Return the budget of a model, that of the device with most of it and so its KV cache."""
        main = max(devices, key=lambda device: devices[device], default="")
        gpus = worker_spec.gpus
        if main in gpus:
            return len(gpus) * min(self._budgets.get(gpu, 0) for gpu in gpus) or None
        return self._budgets.get(main)

    def _placements(self, spec: ModelSpec, on_progress: OnProgress) -> list[ModelSpec]:
        """Return the specification for each set of devices on which the model can run.

        Raises:
            HeadraceError: as `resolve`; the machine has too few GPUs.
        """
        worker_spec = self.resolve(spec, on_progress)
        gpus = [device for device in self._budgets if device != HOST]
        if isinstance(spec, PlacedSpec) or not gpus or worker_spec.file.format == "remote":
            return [spec]
        devices = engines.footprint(worker_spec.engine, open_request(worker_spec)).devices
        count = sum(device != HOST for device in devices)
        sets = placements(read_device(spec.device), [*self._budgets], count) if count else [(HOST,)]
        return [PlacedSpec.of(spec, chosen) for chosen in sets]

    def _memo_key(self, spec: ModelSpec) -> bytes:
        # Secrets in the options are encoded masked.
        return msgspec.json.encode((spec, sorted(self._budgets.items())), enc_hook=str)

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return what the model takes: measured by an earlier load of the same kind, or estimated.

        Where it can be placed on different devices, it is that of the first, and has `choices`.

        Raises:
            HeadraceError: as `resolve`; the machine has too few GPUs.
        """
        needs = [self._need(placed, on_progress) for placed in self._placements(spec, on_progress)]
        choices = tuple(need.devices for need in needs) if len(needs) > 1 else ()
        return msgspec.structs.replace(needs[0], choices=choices)

    def _need(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        worker_spec = self.resolve(spec, on_progress)
        estimated = engines.footprint(worker_spec.engine, open_request(worker_spec))
        estimated = msgspec.structs.replace(estimated, engine=worker_spec.engine)
        need = self._read().get(_key(worker_spec))
        if need is None:
            return msgspec.structs.replace(estimated, load_s=_load_s(worker_spec, estimated))
        # A model that once grew beyond the budget may be loaded again.
        most, held = _larger(estimated.devices, self._budgets), _renamed(need.devices, worker_spec)
        devices = {name: min(size, most.get(name, size)) for name, size in held.items()}
        if "batch" in estimated.parts:
            # No request of earlier loads may have been the largest.
            devices = _larger(devices, estimated.devices)
        return msgspec.structs.replace(
            estimated, devices=devices, how="measured", load_s=need.load_s
        )

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Store what a load really took; of memory, the maximum over all loads.

        A failure to store it is logged: the next load is estimated again.
        """
        # As it was loaded: a file that was removed since then is not downloaded again.
        known = self._resolved.get(self._memo_key(spec))
        worker_spec = known.worker_spec if known else self.resolve(spec, silent)
        try:
            private_folder(self._path.parent)
            lock = self._path.with_name(f".{self._path.name}.lock")
            with FileLock(lock, mode=FILE_MODE):
                needs = self._read()
                old = needs.pop(_key(worker_spec), None)
                held = _renamed(devices, worker_spec, local=True)
                most = _larger(old.devices if old else {}, held)
                needs[_key(worker_spec)] = Need(devices=most, load_s=load_s, seen=time.time())
                latest = sorted(needs.items(), key=lambda item: item[1].seen)[-MAX_REMEMBERED:]
                write_atomically(self._path, msgspec.json.encode(dict(latest)))
        except OSError as error:
            log.warning("headrace.sizing.not_kept", extra={"data": {"error": str(error)}})

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return the longest context with which the model fits into `budgets`, in tokens.

        It is a multiple of 256, and 0 if none fits; None if memory does not depend on it.

        Raises:
            HeadraceError: as `resolve`.
        """
        # On the GPUs with the most memory for models.
        spec = max(
            self._placements(spec, silent),
            key=lambda placed: sum(budgets.get(device, 0) for device in _chosen(placed)),
        )
        worker_spec = self.resolve(spec, silent)
        request = open_request(worker_spec)
        planned = engines.footprint(worker_spec.engine, request)
        if not planned.parts.get("kv_cache"):
            return None
        need = self._read().get(_key(worker_spec))
        surplus = _difference(_renamed(need.devices, worker_spec), planned.devices) if need else {}

        def fits(context: int) -> bool:
            changed = msgspec.structs.replace(request, context_length=context)
            taken = engines.footprint(worker_spec.engine, changed).devices
            return all(taken[d] + surplus.get(d, 0) <= budgets.get(d, 0) for d in taken)

        # From the top down: engines that trade slots for context can need less for a longer one.
        low = (worker_spec.file.context_length or _MOST) // _STEP
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
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, msgspec.DecodeError) as error:
            data = {"path": str(self._path), "error": str(error)}
            log.warning("headrace.sizing.damaged", extra={"data": data})
            return {}


def _key(worker_spec: WorkerSpec) -> str:
    spec = worker_spec.model
    facts: list[Any] = [
        worker_spec.file.path or spec.model,
        worker_spec.file.size,
        _stamp(worker_spec),
        *filter(None, (worker_spec.file.projector,)),
        (worker_spec.engine, engines.version(worker_spec.engine), __version__),
        sorted(spec.options.items()),
        (spec.context_length, spec.max_running, _kind(worker_spec), worker_spec.memory),
        *(adapter.path for adapter in worker_spec.adapters),
    ]
    return hashlib.sha256(msgspec.json.encode(facts, enc_hook=str)).hexdigest()[:32]


def _chosen(spec: ModelSpec) -> tuple[str, ...]:
    return spec.placed if isinstance(spec, PlacedSpec) else ()


def _kind(worker_spec: WorkerSpec) -> tuple[str, int]:
    """Return what all placements with the same need have in common."""
    return read_device(worker_spec.model.device).kind, len(worker_spec.gpus)


def _renamed(
    devices: dict[str, int], worker_spec: WorkerSpec, *, local: bool = False
) -> dict[str, int]:
    """Return bytes by device with the names of the placement, or with the names in its process."""
    names = {f"cuda:{number}": gpu for number, gpu in enumerate(worker_spec.gpus)}
    if local:
        names = {gpu: name for name, gpu in names.items()}
    return {names.get(device, device): amount for device, amount in devices.items()}


def _stamp(worker_spec: WorkerSpec) -> _Stamp:
    """Return size and modification time of the files; zeros for one that there is not."""
    model = worker_spec.file.path if worker_spec.file.format != "remote" else ""
    return (*_status(model), *(n for file in worker_spec.adapters for n in _status(file.path)))


def _status(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat() if path else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)


def _load_s(worker_spec: WorkerSpec, need: Footprint) -> float:
    if worker_spec.file.format == "remote":
        return 0.0
    written = sum(need.devices.values()) - worker_spec.file.size
    return _START_S + worker_spec.file.size / _DISK_RATE + max(0, written) / _MEMORY_RATE


def _larger(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {key: max(first.get(key, 0), second.get(key, 0)) for key in {**first, **second}}


def _difference(measured: dict[str, int], estimated: dict[str, int]) -> dict[str, int]:
    return {key: amount - estimated.get(key, 0) for key, amount in measured.items()}
