"""The library: well-known open models, their hub repositories, and what their files will hold.

`library.toml` beside this module has the facts; a newer file under the home directory replaces it.
Sizes of files are computed from parameters and quantization, within a few per cent.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from headrace.core.errors import ConfigError, UpstreamError
from headrace.core.library import LibraryModel
from headrace.core.model import Task
from headrace.core.private import private_folder, write_atomically
from headrace.models.providers import PROVIDERS

FILE_NAME = "library.toml"
MAX_LIBRARY = 4 << 20
"""Bytes of a library file."""
_OWN = Path(__file__).with_name(FILE_NAME)
_BILLION = 1_000_000_000
# Bits of a weight, with the larger types that each mixture has for some tensors.
_BITS = {
    "Q2_K": 3.2,
    "Q3_K_M": 4.0,
    "Q4_0": 4.7,
    "Q4_K_S": 4.7,
    "Q4_K_M": 4.95,
    "MXFP4": 4.65,
    "Q5_K_M": 5.75,
    "Q6_K": 6.6,
    "Q8_0": 8.55,
    "F16": 16.0,
    "FP16": 16.0,
    "BF16": 16.0,
}
_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_Count = Annotated[int, Meta(ge=1, lt=1 << 32)]
_Billions = Annotated[float, Meta(gt=0, lt=100_000)]


class _Tag(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    repo: Annotated[str, Meta(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")]
    quantizations: Annotated[tuple[str, ...], Meta(min_length=1)]
    parameters: _Billions
    active: _Billions | None = None
    layers: _Count
    kv_heads: _Count
    head_size: _Count
    vocabulary: _Count
    context: _Count
    abilities: tuple[str, ...] | None = None
    license: str | None = None
    checked: date | None = None


class _Family(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    title: str
    about: str
    license: str
    tags: Annotated[dict[Annotated[str, Meta(pattern=f"^{_NAME}$")], _Tag], Meta(min_length=1)]
    abilities: tuple[str, ...] = ()
    task: Task = "generate"
    default: str | None = None


class Library:
    """The models of a library file, by name."""

    def __init__(self, families: Mapping[str, _Family]) -> None:
        self._families = families

    def __iter__(self) -> Iterator[LibraryModel]:
        for family, described in self._families.items():
            for tag in described.tags:
                yield _model(family, described, tag, None)

    def tags(self, family: str) -> list[str]:
        """Return the names of a family's models; empty if there is no such family."""
        described = self._families.get(family.lower())
        return [f"{family}:{tag}" for tag in described.tags] if described else []

    def find(self, name: str) -> LibraryModel | None:
        """Return the model of `family`, `family:tag` or `family:tag-quantization`."""
        family, colon, tag = name.lower().partition(":")
        if (described := self._families.get(family)) is None:
            return None
        if not colon or tag == "latest":
            return _model(family, described, described.default, None) if described.default else None
        if tag in described.tags:
            return _model(family, described, tag, None)
        for known, facts in described.tags.items():
            quantization = tag.removeprefix(f"{known}-").upper()
            if tag.startswith(f"{known}-") and quantization in facts.quantizations:
                return _model(family, described, known, quantization)
        return None


def _model(family: str, described: _Family, tag: str, quantization: str | None) -> LibraryModel:
    facts = described.tags[tag]
    kind = quantization or facts.quantizations[0]
    chosen = f"-{kind.lower()}" if kind != facts.quantizations[0] else ""
    own = facts.abilities
    return LibraryModel(
        name=f"{family}:{tag}{chosen}",
        family=family,
        title=described.title,
        about=described.about,
        reference=f"hub:{facts.repo}:{kind}",
        quantization=kind,
        quantizations=facts.quantizations,
        parameters=round(facts.parameters * _BILLION),
        active=round((facts.active or facts.parameters) * _BILLION),
        size=round(facts.parameters * _BILLION * _BITS[kind] / 8),
        context_length=facts.context,
        layers=facts.layers,
        vocabulary=facts.vocabulary,
        # Keys and values, two bytes each.
        kv_bytes_per_token=4 * facts.layers * facts.kv_heads * facts.head_size,
        license=facts.license or described.license,
        abilities=described.abilities if own is None else own,
        task=described.task,
        checked=facts.checked,
    )


def read(data: bytes) -> Library:
    """Read a library file.

    Raises:
        ConfigError: it is too long, or is none.
    """
    if len(data) > MAX_LIBRARY:
        raise ConfigError(f"The library has more than {MAX_LIBRARY} bytes.")
    try:
        parsed: dict[str, Any] = tomllib.loads(data.decode())
        families = msgspec.convert(
            parsed, dict[Annotated[str, Meta(pattern=f"^{_NAME}$")], _Family]
        )
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"This is no library: {error}.") from error
    for name, family in families.items():
        _check(name, family)
    return Library(families)


def _check(name: str, family: _Family) -> None:
    if name in PROVIDERS:
        raise ConfigError(f"The library's {name} is the name of an upstream.")
    if family.default is not None and family.default not in family.tags:
        raise ConfigError(f"The library's {name} has no tag {family.default}, its default.")
    for tag, facts in family.tags.items():
        if unknown := set(facts.quantizations) - _BITS.keys():
            raise ConfigError(f"The library's {name}:{tag} has {min(unknown)}; not a known type.")


_places: list[Path] = []


def use(home: Path) -> None:
    """Take the library file of this home directory from now on, if it has one."""
    _places[:] = [home / FILE_NAME]


def current() -> Library:
    """Return the library file of the home directory, else Headrace's own. It is read once.

    Raises:
        ConfigError: the file is damaged.
    """
    for path in _places:
        if path.exists():
            try:
                return _load(path, path.stat().st_mtime_ns)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error.message}") from error
    return _load(_OWN, 0)


@cache
def _load(path: Path, stamp: int) -> Library:
    del stamp  # part of the key: a file that was replaced is read again
    with path.open("rb") as file:
        return read(file.read(MAX_LIBRARY + 1))


def update(url: str, home: Path) -> Library:
    """Download a library file, check it and keep it under the home directory. Blocking.

    Raises:
        UpstreamError: it cannot be downloaded.
        ConfigError: it is too long, or is none.
    """
    data = _download(url)
    library = read(data)
    private_folder(home)
    write_atomically(home / FILE_NAME, data)
    use(home)
    return library


def _download(url: str) -> bytes:
    import httpx2 as httpx  # slow to import

    data = bytearray()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=30) as answer:
            if not answer.is_success:
                raise UpstreamError(f"{url} has no library: the answer is {answer.status_code}.")
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > MAX_LIBRARY:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UpstreamError(
            f"The library cannot be downloaded from {url}: {error!s:.200}"
        ) from error
    return bytes(data)
