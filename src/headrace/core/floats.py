"""Vectors as bytes: little-endian 32-bit floats, whatever the machine."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable


def floats_of(vector: bytes) -> array[float]:
    """Return the numbers of a vector."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def bytes_of(values: Iterable[float]) -> bytes:
    """Return the bytes of a vector."""
    vector = array("f", values)
    if sys.byteorder == "big":
        vector.byteswap()
    return vector.tobytes()
