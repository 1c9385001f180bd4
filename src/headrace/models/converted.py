"""Copies of models in another format, made once and kept under `<home>/converted`.

Each has a folder, named by its source: another file at the same path is another model. It is made
in a folder beside it, which is renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from headrace.core.model import ModelFile
from headrace.core.private import FILE_MODE, make_private, private_folder, sync_folder
from headrace.models.transfer import disk_errors, require_free

_SOURCE = "source.txt"


def place(file: ModelFile, home: Path, kind: str = "") -> Path:
    """Return the folder of a model's copy, which may not exist; `kind` is part of its name."""
    path = Path(file.path).resolve()
    facts = (path / "config.json" if path.is_dir() else path).stat()
    text = f"{path} {file.size} {facts.st_mtime_ns}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem)[:80]
    return home / "converted" / "-".join(filter(None, (stem, digest, kind)))


def made(file: ModelFile, target: Path, size: int, make: Callable[[Path], None]) -> Path:
    """Return the folder `target`; if it is not there, `make` fills one that takes its place.

    `size` is in bytes, and has to be free. Blocking.

    Raises:
        DoesNotFit: the disk is too small.
        HeadraceError: what `make` raises.
    """
    private_folder(target.parent)
    lock = FileLock(target.with_suffix(".lock"), mode=FILE_MODE)
    with disk_errors(target.parent), lock:
        if not target.exists():
            require_free(target.parent, size)
            _make(file, target, make)
    return target


def copies(home: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each copy, and the path of the model that it was made from."""
    for note in sorted((home / "converted").glob(f"*/{_SOURCE}")):
        yield note.parent, Path(note.read_text(encoding="utf-8"))


def _make(file: ModelFile, target: Path, make: Callable[[Path], None]) -> None:
    partial = target.with_suffix(".making")
    shutil.rmtree(partial, ignore_errors=True)
    private_folder(partial)
    try:
        make(partial)
        (partial / _SOURCE).write_text(str(Path(file.path).resolve()), encoding="utf-8")
        for path in partial.rglob("*"):
            _flush(path)
        make_private(partial)
        sync_folder(partial)
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
