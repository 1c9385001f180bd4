"""Keeps models under one directory, so that they are fetched once and can be listed and removed.

Under `<home>/models` there are `records` (one small JSON file for each model), `files`
(models of the index; those of the hub stay in the hub's own cache), `partial` (downloads in
progress) and `locks`. A record is written last: a model without one does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from headrace.core import status
from headrace.core.errors import ConfigError, InvalidRequest, LoadFailed, UnknownModel
from headrace.core.model import ModelFile
from headrace.core.private import (
    FILE_MODE,
    make_private,
    private_folder,
    sync_folder,
    write_atomically,
)
from headrace.models.inspect import inspect
from headrace.models.projector import is_projector
from headrace.models.reference import (
    BuiltinReference,
    HubReference,
    IndexReference,
    LocalReference,
    Reference,
    RemoteReference,
    parse,
    pinned,
    short_name,
)
from headrace.models.transfer import Progress, disk_errors, silent

Check = Callable[[Path], object]
_POLL_S = 0.2
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR}


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is on this machine.

    `path` is absolute; `size` is in bytes; `added` is a wall-clock second; `revision` is the
    commit of a hub model.
    """

    reference: str
    path: str
    size: int
    added: int = 0
    sha256: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The catalogue's name, or the reference."""
        return short_name(self.reference)


class Store:
    """The models under one directory. Several processes may use it at once."""

    def __init__(self, home: Path) -> None:
        self._root = home / "models"

    def __repr__(self) -> str:
        return f"Store({str(self._root)!r}, models={len(self.list())})"

    def find(self, reference: Reference) -> StoredModel | None:
        """Return the model if it is stored, without using the network."""
        if isinstance(reference, BuiltinReference | RemoteReference):
            return None
        if isinstance(reference, LocalReference):
            return _local(Path(reference.path))
        model = self._record(self._record_path(reference))
        return model if model is not None and self._is_whole(model) else None

    def list(self) -> list[StoredModel]:
        """Return the models that were fetched and still exist, by name."""
        records = [self._record(path) for path in (self._root / "records").glob("[!.]*.json")]
        models = [model for model in records if model is not None and self._is_whole(model)]
        return sorted([*models, *self._imported()], key=lambda model: model.name)

    def import_links(self, name: str, files: Sequence[Path]) -> Path:
        """Link files, or one folder, of another program here; return the path of the first.

        They are not copied: on the same file system they stay when that program deletes its own.

        Raises:
            LoadFailed: the model is damaged.
            ConfigError: the directory cannot be written.
        """
        with self._writable():
            folder = self._root / "imported" / _file_name(name)
            shutil.rmtree(folder, ignore_errors=True)
            private_folder(folder)
            links: list[Path] = []
            try:
                links += [_linked(path, folder) for path in files]
                inspect(links[0])
            except LoadFailed as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise LoadFailed(error.message.replace(str(links[0]), str(files[0]))) from error
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            sync_folder(folder)
            return links[0]

    def _imported(self) -> Iterator[StoredModel]:
        for folder in (self._root / "imported").glob("*"):
            paths = sorted(folder.iterdir(), key=lambda path: is_projector(path.name))
            if paths and paths[0].exists():
                yield StoredModel(
                    reference=str(paths[0]),
                    path=str(paths[0]),
                    size=sum(map(_size, paths)),
                    added=int(folder.stat().st_mtime),
                )

    def summaries(self) -> list[status.StoredModel]:
        """Return the same models, without where they are."""
        return [msgspec.convert(m, status.StoredModel, from_attributes=True) for m in self.list()]

    def fetch(
        self, reference: Reference, progress: Progress | None = None, check: Check = inspect
    ) -> Path:
        """Return the model's file or folder, after fetching it if it is not stored. Blocking.

        `progress` may raise to cancel: nothing is left behind, and its exception is raised. `check`
        raises if the download is not what is wanted.

        Raises:
            UnknownModel: there is no such model.
            InvalidRequest: the model has no file.
            Unauthorized: the hub wants a token.
            UpstreamError: the index or the hub failed, or sent other content than announced.
            LoadFailed: the downloaded file is damaged.
            DoesNotFit: the disk is too small.
            ConfigError: the directory cannot be written.
        """
        if isinstance(reference, LocalReference):
            return _located(Path(reference.path))
        if isinstance(reference, BuiltinReference):
            raise InvalidRequest(f"{reference} is part of Headrace and has no file.")
        if isinstance(reference, RemoteReference):
            raise InvalidRequest(f"{reference} is served elsewhere and has no file.")
        report = progress or silent
        model = self.find(reference)
        if model is not None:
            return Path(model.path)
        with self._writable(), disk_errors(self._root), self._locked(_key(reference), report):
            self._sweep(_key(reference))
            # Another process may have fetched it while this one waited.
            model = self.find(reference) or self._fetch(reference, report, check)
        return Path(model.path)

    def model_file(self, reference: Reference, progress: Progress | None = None) -> ModelFile:
        """Fetch the model if needed and check its header.

        Raises:
            HeadraceError: as `fetch` and `inspect`.
        """
        if (described := without_file(reference)) is not None:
            return described
        return inspect(self.fetch(reference, progress))

    def remove(self, name: str) -> int:
        """Remove a fetched model by name or reference; return the bytes that became free.

        Local files are never touched. A revision in the hub's cache goes with the last model
        that was fetched from it.

        Raises:
            UnknownModel: it was not fetched.
            InvalidRequest: it is not a model that the store fetches.
        """
        reference = parse(name)
        if isinstance(reference, LocalReference):
            return self._remove_imported(Path(reference.path))
        if not isinstance(reference, HubReference | IndexReference):
            raise InvalidRequest(f"{name!r} was not fetched by Headrace and is not removed.")
        with self._writable(), self._locked(_key(reference), silent):
            path = self._record_path(reference)
            model = self._record(path)
            if model is None:
                names = ", ".join(model.name for model in self.list()) or "none"
                raise UnknownModel(f"{name!r} is not stored. Stored are: {names}.", param="model")
            # The record goes last: without its files it is ignored, and the model fetched again.
            freed = self._remove_files(reference, model)
            path.unlink(missing_ok=True)
            return freed

    def _remove_imported(self, path: Path) -> int:
        if path.parent.parent != self._root / "imported":
            raise InvalidRequest(f"{path} was not fetched by Headrace and is not removed.")
        links = [*path.parent.iterdir()]
        freed = sum(link.stat().st_size for link in links if link.is_file() and _is_last_link(link))
        shutil.rmtree(path.parent)
        return freed

    def _remove_files(self, reference: Reference, model: StoredModel) -> int:
        if not isinstance(reference, HubReference):
            shutil.rmtree(self._root / "files" / _key(reference), ignore_errors=True)
            return model.size
        others = [m for m in self.list() if m.revision == model.revision and m != model]
        if others or model.revision is None:
            return 0
        from headrace.models import source_hub

        return source_hub.remove(reference.repo, model.revision)

    def _fetch(
        self, reference: HubReference | IndexReference, progress: Progress, check: Check
    ) -> StoredModel:
        if isinstance(reference, HubReference):
            model = self._fetch_hub(reference, progress, check)
        else:
            model = self._fetch_index(reference, progress)
        kept = msgspec.structs.replace(model, path=self._relative(model.path))
        write_atomically(self._record_path(reference), msgspec.json.encode(kept))
        return model

    def _fetch_hub(self, reference: HubReference, progress: Progress, check: Check) -> StoredModel:
        from headrace.models import source_hub  # its client is slow to import

        download = source_hub.download(reference, progress)
        check(download.path)
        return StoredModel(
            reference=str(reference),
            path=str(download.path),
            size=download.size,
            added=int(time.time()),
            revision=download.commit,
        )

    def _fetch_index(self, reference: IndexReference, progress: Progress) -> StoredModel:
        from headrace.models import source_index

        entry = pinned(str(reference))
        # A new name each time: a pip that outlived its killed parent cannot write to it.
        work = self._root / "partial" / _key(reference) / uuid.uuid4().hex
        private_folder(work)
        try:
            fetched, digest = source_index.download(reference, work, entry, progress)
            folder = self._root / "files" / _key(reference)
            shutil.rmtree(folder, ignore_errors=True)
            private_folder(folder)
            path = fetched.replace(folder / fetched.name)
            make_private(path)
            sync_folder(folder)
        finally:
            shutil.rmtree(work.parent, ignore_errors=True)
        return StoredModel(
            reference=str(reference),
            path=str(path),
            size=_size(path),
            added=int(time.time()),
            sha256=digest,
        )

    @contextmanager
    def _writable(self) -> Generator[None]:
        made = False
        try:
            for name in ("records", "files", "partial", "locks"):
                private_folder(self._root / name)
            made = True
            yield
        except OSError as error:
            if made and error.errno not in _NOT_WRITABLE:
                raise
            place = error.filename or self._root
            message = f"Models cannot be kept under {self._root}: {place}: {error.strerror}."
            raise ConfigError(message, param="home") from error

    @contextmanager
    def _locked(self, key: str, progress: Progress) -> Generator[None]:
        lock = FileLock(self._root / "locks" / f"{key}.lock", mode=FILE_MODE)
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                progress("waiting for another download", 0, 0)
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, own: str) -> None:
        """Remove the files of killed processes: a lock that is free has no download."""
        for folder in (self._root / "partial").iterdir():
            if folder.name == own:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            place = self._root / "locks" / f"{folder.name}.lock"
            lock = FileLock(place, mode=FILE_MODE)
            with suppress(Timeout), lock.acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)

    def _record_path(self, reference: Reference) -> Path:
        return self._root / "records" / f"{_key(reference)}.json"

    def _record(self, path: Path) -> StoredModel | None:
        try:
            model = msgspec.json.decode(path.read_bytes(), type=StoredModel)
        except (OSError, msgspec.DecodeError):
            return None
        return msgspec.structs.replace(model, path=str(self._root / model.path))

    def _relative(self, path: str) -> str:
        """Return the path as it is stored: relative, as the home directory may be moved."""
        return path.removeprefix(f"{self._root}/")

    def _is_whole(self, model: StoredModel) -> bool:
        path = Path(model.path)
        if not path.is_relative_to(self._root):
            return path.exists()
        return path.exists() and _size(path) == model.size


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _linked(path: Path, folder: Path) -> Path:
    """Link a file, or a folder, into a folder; a file of Ollama, named by its hash, gets a name."""
    own = path.name
    if own.startswith("sha256-"):
        own = f"{'mmproj-' if any(folder.iterdir()) else ''}{folder.name}.gguf"
    link = folder / own
    source = path.resolve()
    try:
        if source.is_dir():
            link.symlink_to(source)
        else:
            link.hardlink_to(source)
    except OSError:
        # Another file system, or the file of another user.
        link.symlink_to(source)
    return link


def _is_last_link(path: Path) -> bool:
    return not path.is_symlink() and path.stat().st_nlink == 1


def without_file(reference: Reference) -> ModelFile | None:
    """Return the description of a model without a file; None for one that has a file."""
    if isinstance(reference, BuiltinReference):
        return ModelFile(path="", format="none", architecture=reference.name)
    if isinstance(reference, RemoteReference):
        return ModelFile(path=reference.model, format="remote", provider=reference.provider)
    return None


def _local(path: Path) -> StoredModel | None:
    if not path.exists():
        return None
    size = path.stat().st_size if path.is_file() else 0
    return StoredModel(reference=str(path), path=str(path), size=size)


def _located(path: Path) -> Path:
    if path.exists():
        return path
    hint = ""
    # Written as org/repo, and not the name of a file in a folder that is there.
    if path.parent.parent == Path.cwd() and not path.parent.exists() and path.suffix != ".gguf":
        hint = f" For a repository on the hub write hub:{'/'.join(path.parts[-2:])}."
    raise UnknownModel(f"There is nothing at {path}.{hint}", param="model")


def _key(reference: Reference) -> str:
    return _file_name(str(reference))


def _file_name(text: str) -> str:
    """Return a readable and unique file name for a text."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', text)[:80]}-{digest}"
