"""Files and folders that belong to the user alone, whatever the umask; writes that last."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_OF_OTHERS = 0o077


def private_folder(path: Path) -> Path:
    """Create a folder, and those above it that do not exist, for this user alone; return it.

    Those that exist are left as they are: one may be of a file that the user has named.

    Raises:
        OSError: it cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        # Another process may be as far.
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        folder.chmod(_FOLDER_MODE)
    path.mkdir(exist_ok=True)
    return path


def close_to_others(folder: Path) -> None:
    """Close the home of a service, which earlier versions made as the umask said.

    One that is not there, is another user's, or is for all users, such as /tmp, is left.
    """
    with contextlib.suppress(OSError):
        status = folder.stat()
        is_own = status.st_uid == os.getuid() and not status.st_mode & stat.S_ISVTX
        if is_own and status.st_mode & _OF_OTHERS:
            folder.chmod(_FOLDER_MODE)


def make_private(path: Path) -> None:
    """Give a file, or a folder with all that is in it, to this user alone.

    Raises:
        OSError: it belongs to another user.
    """
    for item in (path, *path.rglob("*")):
        if not item.is_symlink():
            item.chmod(_FOLDER_MODE if item.is_dir() else FILE_MODE)


def write_atomically(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Replace a file atomically; it is never half written, not even after a power cut.

    It has exactly this mode; by default only its owner may read it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
