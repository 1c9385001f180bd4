"""Downloads models from the Hugging Face hub, through its own client and into its own cache.

The client reads its own variables: token, endpoint, cache folder, offline mode. Files are
fetched one after another by the commit of the listing, so a repository that changes meanwhile
cannot mix two states. Of a repository of GGUF files one model is taken; of
others the safetensors with their JSON and tokenizer files. Pickles are never fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Self, cast

import huggingface_hub
import msgspec
from huggingface_hub import errors

from headrace.core.errors import (
    HeadraceError,
    InvalidRequest,
    Unauthorized,
    UnknownModel,
    UpstreamError,
)
from headrace.models import gguf_model, projector
from headrace.models.reference import HubReference
from headrace.models.transfer import CHUNK, Progress

SMALL = 2 << 30
"""Up to this many bytes a Q8_0 file is preferred: nearly lossless, and quick on CPUs."""
PREFERRED = (
    *("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q5_K_S", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "IQ4_XS", "IQ4_NL"),
    *("Q5_1", "Q4_1", "MXFP4", "Q3_K_L", "Q3_K_M", "BF16", "F16", "F32"),
)
"""Q4_K_M first: the smallest with little loss; then better ones, then others that run anywhere."""
_CONFIGS = frozenset({"config.json", "adapter_config.json"})
_TOKENIZER = frozenset({".json", ".jinja", ".txt", ".tiktoken", ".model"})
_PART = re.compile(r"-\d{5}-of-\d{5}$")


class HubFile(msgspec.Struct, frozen=True):
    """One file of a repository; `sha256` is None for small ones, which git keeps."""

    name: str
    size: int = 0
    sha256: str | None = None


class HubModel(msgspec.Struct, frozen=True):
    """A model in the hub's cache: its file or folder, the commit, and bytes in all."""

    path: Path
    commit: str
    size: int


class _Tracker:
    """Adds up the bytes of all files and keeps the exception that the caller's callback raised."""

    def __init__(self, progress: Progress) -> None:
        self.raised: BaseException | None = None
        self.done, self.total = 0, 0
        self._progress = progress

    def report(self, activity: str, more: int = 0) -> None:
        self.done += more
        try:
            self._progress(activity, self.done, self.total)
        except BaseException as error:
            self.raised = error
            raise

    def bar(self) -> type[Any]:
        """Return a class that the hub's client uses as its progress bar."""
        tracker = self

        class Bar:
            def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
                tracker.done += initial

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, n: float | None = 1) -> None:
                tracker.report("downloading", int(n or 0))

            def close(self) -> None:
                pass

            def refresh(self) -> None:
                pass

            def set_description(self, *_: object, **__: object) -> None:
                pass

        return Bar


def download(reference: HubReference, progress: Progress) -> HubModel:
    """Download a model into the hub's cache; use the cache where the hub cannot be reached.

    Raises:
        UnknownModel: no such repository, revision, file or quantisation.
        Unauthorized: the repository is gated or private.
        UpstreamError: the hub cannot be reached, failed, or sent other content than announced.
    """
    tracker = _Tracker(progress)
    try:
        return _download(reference, tracker)
    except HeadraceError:
        raise
    except Exception as error:  # noqa: BLE001 - its HTTP library's errors come through, and which that is changes
        if tracker.raised is not None:
            raise tracker.raised from None
        cached = None if _is_refusal(error) else _cached(reference)
        if cached is not None:
            return cached
        _translate(reference, error)


def remove(repo: str, commit: str) -> int:
    """Delete one revision from the hub's cache; return the bytes that became free."""
    if all(revision.commit_hash != commit for revision in _revisions(repo)):
        return 0
    strategy = huggingface_hub.scan_cache_dir().delete_revisions(commit)
    strategy.execute()
    return strategy.expected_freed_size


def choose(reference: HubReference, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files to fetch, the model's own (or its first part) first.

    Raises:
        UnknownModel: the repository has no such file, or no supported model.
    """
    models = _gguf_models(files)
    if reference.file is not None:
        if reference.file not in models:
            raise _no_such_file(reference, models)
        return _seeing(models[reference.file], files)
    if reference.quantization is not None:
        matches = [name for name in models if _has(name, reference.quantization)]
        if not matches:
            raise _no_such_file(reference, models)
        return _seeing(models[min(matches, key=len)], files)
    if not models:
        return _safetensors(reference, files)
    return _seeing(models[_preferred(models)], files)


def _seeing(chosen: list[HubFile], files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files of a model, with the projector for images in the same folder."""
    folder = PurePosixPath(chosen[0].name).parent
    near = {file.name: file for file in files if PurePosixPath(file.name).parent == folder}
    name = projector.choose(chosen[0].name, near)
    return chosen if name is None else [*chosen, near[name]]


def _download(reference: HubReference, tracker: _Tracker) -> HubModel:
    tracker.report("asking the hub")
    info = huggingface_hub.HfApi().model_info(
        reference.repo, revision=reference.revision, files_metadata=True
    )
    if info.sha is None:
        raise UpstreamError(f"The hub gave no commit for {reference}.")
    files = [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in info.siblings or ()
    ]
    chosen = choose(reference, files)
    tracker.total = sum(file.size for file in chosen)
    paths = [_fetch(reference.repo, file, info.sha, tracker) for file in chosen]
    return _model(chosen, paths, info.sha)


def _fetch(repo: str, file: HubFile, commit: str, tracker: _Tracker) -> Path:
    before = tracker.done
    path = Path(
        huggingface_hub.hf_hub_download(  # pyright: ignore[reportUnknownMemberType]
            repo, file.name, revision=commit, tqdm_class=cast("Any", tracker.bar())
        )
    )
    if tracker.raised is not None:  # native code may have swallowed it
        raise tracker.raised
    tracker.done = before + file.size
    if file.sha256 is not None and _sha256(path, tracker) != file.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        message = f"{repo}: {file.name} is not what the hub announced (sha256); it was removed."
        raise UpstreamError(message)
    return path


def _sha256(path: Path, tracker: _Tracker) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            tracker.report("verifying")
    return digest.hexdigest()


def _model(chosen: Sequence[HubFile], paths: Sequence[Path], commit: str) -> HubModel:
    size = sum(path.stat().st_size for path in paths)
    whole = chosen[0].name.lower().endswith(".gguf")
    return HubModel(paths[0] if whole else paths[0].parent, commit, size)


def _cached(reference: HubReference) -> HubModel | None:
    """Return the model if the cache has all of its files."""
    wanted = reference.revision or "main"
    for revision in _revisions(reference.repo):
        if wanted != revision.commit_hash and wanted not in revision.refs:
            continue
        folder = revision.snapshot_path
        files = [
            HubFile(file.file_path.relative_to(folder).as_posix(), file.size_on_disk)
            for file in revision.files
        ]
        chosen = choose(reference, files)
        return _model(chosen, [folder / file.name for file in chosen], revision.commit_hash)
    return None


def _revisions(repo: str) -> list[huggingface_hub.CachedRevisionInfo]:
    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.CacheNotFound:
        return []
    return [revision for cached in repos if cached.repo_id == repo for revision in cached.revisions]


def _gguf_models(files: Sequence[HubFile]) -> dict[str, list[HubFile]]:
    """Return models by the name of their (first) file; without projectors and matrices."""
    present = {file.name: file for file in files if file.name.lower().endswith(".gguf")}
    models: dict[str, list[HubFile]] = {}
    for name in sorted(present):
        file_name = PurePosixPath(name).name
        if gguf_model.is_later_part(file_name) or projector.is_projector(file_name):
            continue
        if "imatrix" in file_name.lower():
            continue
        parts = [path.as_posix() for path in gguf_model.parts(Path(name))]
        if all(part in present for part in parts):
            models[name] = [present[part] for part in parts]
    return models


def _has(name: str, quantization: str) -> bool:
    stem = _PART.sub("", PurePosixPath(name).name[:-5])
    pattern = rf"(?:^|[-._]){re.escape(quantization)}(?:$|[-.])"
    return re.search(pattern, stem, re.IGNORECASE) is not None


def _preferred(models: dict[str, list[HubFile]]) -> str:
    sizes = {name: sum(file.size for file in files) for name, files in models.items()}
    for name in models:
        if _has(name, "Q8_0") and 0 < sizes[name] <= SMALL:
            return name
    for quantization in PREFERRED:
        matches = [name for name in models if _has(name, quantization)]
        if matches:
            return min(matches, key=len)
    return min(models, key=lambda name: (sizes[name], name))


def _safetensors(reference: HubReference, files: Sequence[HubFile]) -> list[HubFile]:
    top = [file for file in files if "/" not in file.name]
    weights = [file for file in top if file.name.endswith(".safetensors")]
    # Mistral's repositories have all weights twice, once under this name.
    weights = [w for w in weights if not w.name.startswith("consolidated")] or weights
    if not weights or not any(file.name in _CONFIGS for file in top):
        raise _no_such_file(reference, {})
    return weights + [file for file in top if PurePosixPath(file.name).suffix in _TOKENIZER]


def _no_such_file(reference: HubReference, models: dict[str, list[HubFile]]) -> UnknownModel:
    if models:
        has = f"It has: {', '.join(list(models)[:40])}"
        return UnknownModel(f"{reference}: no such file in the repository. {has}.", param="model")
    message = "no GGUF files and no safetensors with a config.json (pickles are not loaded)"
    return UnknownModel(f"{reference}: the repository has {message}.", param="model")


def _is_refusal(error: Exception) -> bool:
    """Whether the hub itself refused; then the cache is not used instead."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code < 500 and error.response.status_code != 429
    return isinstance(error, errors.HFValidationError)


def _translate(reference: HubReference, error: Exception) -> NoReturn:
    detail = f"{type(error).__name__}: {error}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError) or status == 403:
        reason = "access has to be requested on the hub, and HF_TOKEN set"
        raise Unauthorized(f"{reference}: {reason}.", param="model", detail=detail) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        reason = "no such repository on the hub, or it is private and HF_TOKEN is not set"
        raise UnknownModel(f"{reference}: {reason}.", param="model", detail=detail) from error
    if isinstance(error, errors.RevisionNotFoundError):
        reason = f"the repository has no revision {reference.revision}"
        raise UnknownModel(f"{reference}: {reason}.", param="model", detail=detail) from error
    if status == 401:
        reason = "the hub refuses the token in HF_TOKEN"
        raise Unauthorized(f"{reference}: {reason}.", param="model", detail=detail) from error
    if isinstance(error, errors.HFValidationError):
        raise InvalidRequest(f"{reference}: {error}", param="model") from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set, and the model is not in the cache"
        raise UpstreamError(f"{reference}: {reason}.", detail=detail) from error
    if isinstance(error, OSError) and error.errno is not None and not status:
        raise error
    reason = f"the hub answered {status}" if status else "the hub cannot be reached"
    raise UpstreamError(f"{reference}: {reason}.", detail=detail) from error
