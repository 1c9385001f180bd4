"""Shared by all downloads: progress, free space and durable writes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from headrace.core.errors import DoesNotFit

Progress = Callable[[str, int, int], None]
"""Called with the activity, bytes done and bytes in all (0: unknown).

It is called several times a second; an exception that it raises ends the work.
"""

CHUNK = 1 << 20
RESERVE = 64 << 20
"""Bytes that stay free: a full disk breaks other programs."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def silent(_activity: str, _done: int, _total: int) -> None:
    """Ignore the progress."""


def require_free(folder: Path, size: int) -> None:
    """Check that `size` more bytes fit into the folder's file system.

    Raises:
        DoesNotFit: they do not.
    """
    free = shutil.disk_usage(folder).free
    if size + RESERVE > free:
        needed, available = mebibytes(size + RESERVE), mebibytes(free)
        raise DoesNotFit(
            f"No room on the disk for the model: {folder} has {available}, needs {needed}."
        )


def mebibytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**20:,.1f} MiB"


def disk_full(folder: Path) -> DoesNotFit:
    """Return the error for a disk that became full."""
    return DoesNotFit(f"The disk of {folder} became full; the unfinished download was removed.")


@contextmanager
def disk_errors(folder: Path) -> Generator[None]:
    """Translate the system's errors for a full disk.

    Raises:
        DoesNotFit: the disk is full, or the user's quota is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise disk_full(folder) from error


def copy_hashed(source: IO[bytes], target: Path, size: int, progress: Progress) -> tuple[int, str]:
    """Write at most `size` bytes to a new file and flush it; return their number and sha256."""
    digest = hashlib.sha256()
    done = 0
    with target.open("xb") as file:
        while done < size and (chunk := source.read(min(CHUNK, size - done))):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress("unpacking", done, size)
        file.flush()
        os.fsync(file.fileno())
    return done, digest.hexdigest()
