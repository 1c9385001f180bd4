"""Models that other programs of this machine have downloaded: Ollama, LM Studio, llama.cpp, hub.

Only files are read; none of the programs has to run. What cannot be read is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from headrace.models import projector
from headrace.models.gguf_model import is_later_part, parts

Program = Literal["ollama", "lmstudio", "llama.cpp", "hub"]
MAX_MANIFEST = 1 << 20
"""Bytes of a manifest of Ollama, and of a text that it refers to."""
MAX_CACHED = 10_000
"""Files that are looked at in the cache of a program."""
_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME_PART = re.compile(r"\w[\w.-]*")
_REGISTRY = ("registry.ollama.ai", "library")
_CACHED_NAME = re.compile(r".*?[-_.]gguf_(?P<file>.+)", re.IGNORECASE)


class CachedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of another program.

    `path` is a GGUF file or a folder, `size` in bytes, that of all its files. `modelfile` has the
    instructions of Ollama's Modelfile beside FROM.
    """

    program: Program
    name: str
    path: str
    size: int
    projector: str | None = None
    modelfile: str = ""


def cached_models(environ: Mapping[str, str]) -> Iterator[CachedModel]:
    """Yield the models of all programs; `environ` may name their folders."""
    home = Path(environ.get("HOME") or Path.home())
    seen: set[tuple[str, str]] = set()
    for find in (_ollama, _lmstudio, _llamacpp, _hub):
        for model in find(environ, home):
            if (model.program, model.path) not in seen:
                seen.add((model.program, model.path))
                yield model


def ollama_stores(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    """Yield the folders that Ollama may keep models in."""
    if named := environ.get("OLLAMA_MODELS"):
        yield Path(named).expanduser()
    yield home / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def ollama_weights(name: str) -> Path | None:
    """Return the file of weights that Ollama has for a name, None if it has none."""
    path, _, tag = name.partition(":")
    names = [*_REGISTRY, *path.split("/")] if "/" not in path else [_REGISTRY[0], *path.split("/")]
    names = [*names[-3:], tag or "latest"]
    if not all(map(_NAME_PART.fullmatch, names)):
        return None
    for store in ollama_stores(os.environ, Path("~").expanduser()):
        layers = _layers(store.joinpath("manifests", *names))
        if (weights := _blob(store, layers.get("model"))) is not None:
            return weights
    return None


def _ollama(environ: Mapping[str, str], home: Path) -> Iterator[CachedModel]:
    for store in ollama_stores(environ, home):
        manifests = store / "manifests"
        for manifest in _files(manifests, "*/*/*/*"):
            layers = _layers(manifest)
            weights = _blob(store, layers.get("model"))
            if weights is None or "adapter" in layers:
                continue
            sees = _blob(store, layers.get("projector"))
            host, owner, name, tag = manifest.relative_to(manifests).parts
            prefix = [part for part in (host, owner) if part not in _REGISTRY]
            yield CachedModel(
                program="ollama",
                name="/".join([*prefix, name]) + f":{tag}",
                path=str(weights),
                size=_size(weights) + (_size(sees) if sees else 0),
                projector=str(sees) if sees else None,
                modelfile=_modelfile(store, layers),
            )


def _layers(manifest: Path) -> dict[str, str]:
    """Return the digests of a manifest by the kind of their layer."""
    try:
        with manifest.open("rb") as file:
            layers = json.loads(file.read(MAX_MANIFEST))["layers"]
        kinds = {str(i["mediaType"]).removeprefix(_LAYER): str(i.get("digest")) for i in layers}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return {kind: text for kind, text in kinds.items() if _DIGEST.fullmatch(text)}


def _blob(store: Path, digest: str | None) -> Path | None:
    path = store / "blobs" / digest.replace(":", "-") if digest else None
    # A blob of another user may not be read.
    return path if path and os.access(path, os.R_OK) and path.is_file() else None


def _modelfile(store: Path, layers: Mapping[str, str]) -> str:
    """Return the instructions that have the parameters and the system message of a model."""
    lines: list[str] = []
    with suppress(ValueError, RecursionError, AttributeError):
        parameters: dict[str, Any] = json.loads(_text(store, layers.get("params")) or "{}")
        for name, value in parameters.items():
            values = cast("list[Any]", value if isinstance(value, list) else [value])
            lines += [f'PARAMETER {name} """{item}"""' for item in values]
    system = _text(store, layers.get("system"))
    lines += [f'SYSTEM """{system}"""'] * bool(system)
    return "\n".join(line for line in lines if line.count('"""') == 2)


def _text(store: Path, digest: str | None) -> str:
    path = _blob(store, digest)
    if path is None:
        return ""
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST).decode(errors="replace")


def _lmstudio(environ: Mapping[str, str], home: Path) -> Iterator[CachedModel]:
    del environ
    roots = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with suppress(OSError, ValueError):
        roots.insert(0, Path((home / ".lmstudio-home-pointer").read_text("utf-8").strip()))
    for root in dict.fromkeys(roots):
        yield from _gguf("lmstudio", _files(root / "models", "*/*/*.gguf"))


def _llamacpp(environ: Mapping[str, str], home: Path) -> Iterator[CachedModel]:
    places = [home / ".cache" / "llama.cpp", home / "Library" / "Caches" / "llama.cpp"]
    if named := environ.get("LLAMA_CACHE"):
        places.insert(0, Path(named).expanduser())

    def name_of(stem: str) -> str:
        match = _CACHED_NAME.fullmatch(stem)
        return match["file"] if match else stem

    for place in dict.fromkeys(places):
        yield from _gguf("llama.cpp", _files(place, "*.gguf"), name_of)


def _hub(environ: Mapping[str, str], home: Path) -> Iterator[CachedModel]:
    cache = environ.get("HF_HUB_CACHE") or Path(
        environ.get("HF_HOME") or home / ".cache" / "huggingface", "hub"
    )
    for repo in _folders(Path(cache).expanduser(), "models--*"):
        if (snapshot := _snapshot(repo)) is None:
            continue
        gguf = [*_gguf("hub", _files(snapshot, "**/*.gguf"))]
        yield from gguf
        weights = [*snapshot.glob("*.safetensors")]
        if not gguf and weights and (snapshot / "config.json").is_file():
            yield CachedModel(
                program="hub",
                name=repo.name.rpartition("--")[2],
                path=str(snapshot),
                size=sum(map(_size, weights)),
            )


def _snapshot(repo: Path) -> Path | None:
    """Return the folder of the main revision, else the latest."""
    with suppress(OSError, ValueError):
        main = repo / "snapshots" / (repo / "refs" / "main").read_text("ascii").strip()
        if main.is_dir() and main.parent == repo / "snapshots":
            return main
    return max(_folders(repo / "snapshots", "*"), key=_changed, default=None)


def _gguf(
    program: Program, files: Iterator[Path], name_of: Callable[[str], str] = str
) -> Iterator[CachedModel]:
    """Yield a model for each GGUF file that is neither a projector nor a later part."""
    for file in files:
        if projector.is_projector(file.name) or is_later_part(file.name):
            continue
        with suppress(OSError, ValueError):
            names = [path.name for path in file.parent.iterdir()]
            sees = projector.choose(file.name, names)
            whole = [*parts(file), *([file.parent / sees] if sees else [])]
            yield CachedModel(
                program=program,
                name=name_of(re.sub(r"-00001-of-\d{5}$", "", file.stem)),
                path=str(file),
                size=sum(map(_size, whole)),
                projector=str(file.parent / sees) if sees else None,
            )


def _files(root: Path, pattern: str) -> Iterator[Path]:
    with suppress(OSError):
        paths = (path for _, path in zip(range(MAX_CACHED), root.glob(pattern), strict=False))
        yield from sorted(path for path in paths if path.is_file())


def _folders(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in root.glob(pattern) if path.is_dir())
    except OSError:
        return []


def _size(path: Path) -> int:
    return path.stat().st_size


def _changed(path: Path) -> float:
    return path.stat().st_mtime
