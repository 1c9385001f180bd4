"""The rate that memory allows: its bandwidth divided by the bytes read for a step."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from headrace import machine
from headrace.core.model import ModelFile
from headrace.core.private import private_folder, write_atomically
from headrace.engines.measured import machine_id

FILE_NAME = "bandwidth.json"
_SIZE = 256 << 20
_PASSES = 6
_SPARE = 8
"""How many times the memory of a measurement has to be free beside a service."""


class _Known(msgspec.Struct, frozen=True):
    machine: str
    bandwidth: float


def bandwidth(home: Path) -> float:
    """Return the highest bytes/s that all cores together have ever read. Blocking.

    It is measured again each time, as other programs may have used the memory before.
    """
    best = max(_measured(home) or 0.0, read_bandwidth(machine.usable_cpus()))
    private_folder(home)
    write_atomically(home / FILE_NAME, msgspec.json.encode(_Known(machine_id(), best)))
    return best


def known_bandwidth(home: Path) -> float | None:
    """Return the highest bytes/s that were ever read, for a service. Blocking.

    It is measured only if it never was on this machine, and if that takes little of the memory that
    is free; else it is None.
    """
    if (known := _measured(home)) is not None:
        return known
    host = next(device for device in machine.devices() if device.key == machine.HOST)
    taken = _SIZE * machine.usable_cpus()
    return bandwidth(home) if taken * _SPARE < host.total - host.used else None


def _measured(home: Path) -> float | None:
    try:
        known = msgspec.json.decode((home / FILE_NAME).read_bytes(), type=_Known)
    except (OSError, msgspec.DecodeError):
        return None
    return known.bandwidth if known.machine == machine_id() else None


def read_bandwidth(threads: int, size: int = _SIZE, passes: int = _PASSES) -> float:
    """Measure how many bytes/s `threads` read, each from `size` bytes of its own. Blocking.

    It is the best of several passes: other programs can only make a pass slower. Nothing is
    written, so each byte counts once. `size` must be far above the caches.
    """
    # Memory that was never written to is one page of zeros, which is always in the cache.
    blocks = [bytearray(b"\x01") * size for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return max(_pass(pool, blocks) for _ in range(passes))


def _pass(pool: ThreadPoolExecutor, blocks: Sequence[bytearray]) -> float:
    began = time.perf_counter()
    done = sum(pool.map(_read, blocks))
    return done / (time.perf_counter() - began)


def _read(block: bytearray) -> int:
    """Search for a byte that does not occur: the C library reads all of it without the GIL."""
    library = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
    library.memchr.restype = ctypes.c_void_p
    start = (ctypes.c_char * len(block)).from_buffer(block)
    place = library.memchr(start, ctypes.c_int(0), ctypes.c_size_t(len(block)))
    assert place is None, "there is no such byte"
    return len(block)


def bytes_per_step(file: ModelFile, streams: int, tokens: float) -> float:
    """Return the bytes read for one token of each stream: the weights once, and every cache.

    `tokens` is the mean length of a stream's cache.
    """
    return file.size + streams * tokens * (file.kv_bytes_per_token or 0)


def limit(file: ModelFile, streams: int, tokens: float, bandwidth: float) -> float | None:
    """Return the most output tokens/s that the memory allows; None if there are no weights."""
    step = bytes_per_step(file, streams, tokens)
    return streams * bandwidth / step if step else None
