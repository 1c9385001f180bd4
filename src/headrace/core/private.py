"""Files and folders that belong to the user alone, whatever the umask."""

from __future__ import annotations

from pathlib import Path

FILE_MODE = 0o600
_FOLDER_MODE = 0o700


def private_folder(path: Path) -> Path:
    """Create a folder, and those above it that do not exist, for this user alone; return it.

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


def make_private(path: Path) -> None:
    """Give a file, or a folder with all that is in it, to this user alone.

    Raises:
        OSError: it belongs to another user.
    """
    for item in (path, *path.rglob("*")):
        if not item.is_symlink():
            item.chmod(_FOLDER_MODE if item.is_dir() else FILE_MODE)
