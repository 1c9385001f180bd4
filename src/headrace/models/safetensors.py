"""Reads and checks the headers of safetensors files, before any library loads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from headrace.core.errors import LoadFailed
from headrace.models.files import open_regular

MAX_HEADER = 16 << 20
MAX_COLONS = 500_000
"""An entry has four; counting them before the header is parsed bounds its memory."""
MAX_RANK = 16

BITS = MappingProxyType(
    {
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "C64": 64,
        "F32": 32,
        "I32": 32,
        "U32": 32,
        "F16": 16,
        "BF16": 16,
        "I16": 16,
        "U16": 16,
        "I8": 8,
        "U8": 8,
        "BOOL": 8,
        "F8_E4M3": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    }
)


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class SafetensorsHeader:
    """A consistent header; `weights` counts by type, `size` is that of the file in bytes.

    `shapes` are those of the tensors by name, the slowest dimension first.
    """

    path: Path
    size: int
    tensors: int
    weights: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def read_header(path: Path) -> SafetensorsHeader:
    """Read one file's header.

    Raises:
        LoadFailed: it is not a regular file, or its header is inconsistent.
    """
    with open_regular(path) as (file, size):
        first = file.read(8) or b""
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        text = file.read(length) or b""
    if len(text) != length or not text.startswith(b"{") or text.count(b":") > MAX_COLONS:
        raise _damaged(path, "the header is no list of tensors, or far too long")
    entries = _entries(path, text)
    _check_layout(path, entries, size - 8 - length)
    weights: Counter[str] = Counter()
    for entry in entries.values():
        weights[entry.dtype] += math.prod(entry.shape)
    shapes = {name: entry.shape for name, entry in entries.items()}
    return SafetensorsHeader(path, size, len(entries), weights, shapes)


def _damaged(path: Path, reason: str) -> LoadFailed:
    return LoadFailed(f"{path}: damaged safetensors: {reason}.")


def _entries(path: Path, text: bytes) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = raw.pop("__metadata__", None)
        if metadata is not None:
            msgspec.json.decode(metadata, type=dict[str, Any])
        entry = msgspec.json.Decoder(_Entry)
        return {name: entry.decode(value) for name, value in raw.items()}
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise _damaged(path, f"the header is not sound: {error}") from error


def _check_layout(path: Path, entries: Mapping[str, _Entry], data: int) -> None:
    """Check that the tensors fill the file, in order, without gaps and overlaps."""
    if not entries:
        raise _damaged(path, "there are no tensors in it")
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        shown = repr(name[:80])
        begin, end = entry.data_offsets
        bits = BITS.get(entry.dtype)
        if bits is None:
            raise _damaged(path, f"{shown} has the unknown type {entry.dtype[:20]!r}")
        if len(entry.shape) > MAX_RANK or any(not 0 <= n < 1 << 48 for n in entry.shape):
            raise _damaged(path, f"{shown} has an impossible shape")
        if begin != offset or end < begin or (end - begin) * 8 != bits * math.prod(entry.shape):
            raise _damaged(path, f"{shown} is at {begin} to {end}, which cannot be")
        offset = end
    if offset != data:
        raise _damaged(path, f"{data} bytes of tensors, but {offset} are described")
