"""Files and folders that belong to the user alone, whatever the umask; writes that last."""

from __future__ import annotations

import os
import stat
from pathlib import Path

FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_OF_OTHERS = 0o077


def private_folder(path: Path) -> Path:
    """Create a folder, and those above it that do not exist, for this user alone; return it.

    One that exists is made private too, if it is this user's: earlier versions followed the umask.
    Those above it are left, and so are folders for all users, such as /tmp.

    Raises:
        OSError: it cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        # Another process may be as far.
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        folder.chmod(_FOLDER_MODE)
    path.mkdir(exist_ok=True)
    status = path.stat()
    is_shared = status.st_mode & stat.S_ISVTX or status.st_uid != os.getuid()
    if status.st_mode & _OF_OTHERS and not is_shared:
        path.chmod(_FOLDER_MODE)
    return path


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
