"""Shared by the readers of model files: opening regular files only, and context lengths."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headrace.core.errors import LoadFailed

NO_LIMIT = 100_000_000
"""Tokenizers write larger numbers for "no limit"."""
MAX_WORD = 256
"""Characters of a name in a header, such as that of an architecture."""
MAX_CACHE = 1 << 32
"""Bytes of the cache for a token: with the largest context it can still be counted by all."""


@contextmanager
def open_regular(path: Path) -> Generator[tuple[BinaryIO, int]]:
    """Open a regular file without blocking; yield it and its size in bytes.

    Raises:
        LoadFailed: it is missing, unreadable, a folder, a pipe, a socket or a device.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        _check_kind(path, os.stat(path).st_mode)  # noqa: PTH116 - the same call as for descriptors
        descriptor = os.open(path, flags)
    except OSError as error:
        raise LoadFailed(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL in the path
        raise LoadFailed(f"{path}: not a path.") from error
    try:
        # The path may have been replaced since; the open descriptor cannot be.
        facts = os.fstat(descriptor)
        _check_kind(path, facts.st_mode)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            yield file, facts.st_size
    except OSError as error:
        raise LoadFailed(f"{path}: {error.strerror or error}.") from error
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a small file.

    Raises:
        LoadFailed: as `open_regular`, or it has more than `limit` bytes.
    """
    with open_regular(path) as (file, size):
        if size > limit:
            raise LoadFailed(f"{path}: {size} bytes are more than the {limit} allowed.")
        return file.read(limit) or b""


def check_facts(path: Path, cache: int | None, *words: str | None) -> None:
    """Check what a header says of its model, which others count with, list and pass on.

    Raises:
        LoadFailed: the cache for a token is larger than any, or a name is none.
    """
    if cache is not None and cache >= MAX_CACHE:
        raise LoadFailed(f"{path}: {cache} bytes of cache for each token, which is impossible.")
    for word in filter(None, words):
        if len(word) > MAX_WORD or not word.isprintable():
            raise LoadFailed(f"{path}: {word[:80]!r} is no name of an architecture or a type.")


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise LoadFailed(f"{path}: not a regular file but {kind}.")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def scaled_context(
    limit: float | None,
    *,
    kind: str | None = None,
    factor: float | None = None,
    original: float | None = None,
    architecture: str = "",
) -> int | None:
    """Return the context length in tokens with rope scaling counted in, or None.

    With an `original` length the scaled one is original * factor, or `limit` where that is larger,
    as some models state the scaled length. Without one, linear, dynamic and yarn scaling multiply
    `limit`, except in Gemma 3, which states the scaled length.
    """
    if limit is not None and not 0 < limit < NO_LIMIT:
        limit = None
    scaled = limit or 0
    if factor is not None and 1 <= factor < NO_LIMIT and kind not in (None, "none", "default"):
        if original is not None:
            # A whole number of any length cannot be multiplied.
            scaled = max(scaled, original * factor) if 0 < original < NO_LIMIT else 0
        elif kind in ("linear", "dynamic", "yarn") and not architecture.startswith("gemma3"):
            scaled *= factor
    return int(scaled) if 0 < scaled < NO_LIMIT else None
