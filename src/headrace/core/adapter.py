"""LoRA adapters: small changes of a model's weights, each served under a name of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from headrace.core.errors import UnknownModel

SEPARATOR = ":"
"""Between the name of a model and that of its adapter, in the name that requests use."""

MAX_ADAPTERS = 64
"""Adapters of one model: the engines reserve memory for each."""
MAX_SCALE = 100.0
_KEYS = ("source", "scale", "name")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as it is configured; `source` is a reference, as that of a model.

    `scale` multiplies what it changes. `name` is the name in requests, beside `MODEL:ADAPTER`.
    """

    source: str
    scale: float = 1.0
    name: str | None = None


class AdapterFile(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter on disk whose header has been checked; `size` is in bytes.

    `scale` multiplies its changes, beside `alpha` over the rank. With `root_rank` that is over the
    root of the rank. `rank` is the largest of its matrices.
    """

    path: str
    format: Literal["gguf", "safetensors"]
    rank: int
    size: int
    name: str = ""
    alpha: float = 0.0
    scale: float = 1.0
    root_rank: bool = False


def checked_adapters(value: object) -> object:
    """Return adapters by their names, from references or tables; text is JSON.

    Raises:
        ValueError: a name or a value is not accepted.
    """
    given: Any = json.loads(value) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        return given
    tables = cast("Mapping[str, object]", given)
    if len(tables) > MAX_ADAPTERS:
        raise ValueError(f"a model has at most {MAX_ADAPTERS} adapters")
    return {name: _checked(name, table) for name, table in tables.items()}


def _checked(name: str, value: object) -> Adapter:
    if not name.strip() or not name.isprintable() or len(name) > 128:
        raise ValueError("the name of an adapter has 1 to 128 characters that can be printed")
    if isinstance(value, Adapter):
        return value
    table = cast("Mapping[str, Any]", value if isinstance(value, Mapping) else {"source": value})
    if unknown := [key for key in table if key not in _KEYS]:
        raise ValueError(f"{name}.{unknown[0]} is none of {', '.join(_KEYS)}")
    source, own, scale = table.get("source"), table.get("name"), table.get("scale", 1.0)
    if not isinstance(source, str) or not source:
        raise ValueError(f"{name} is a reference, or a table with a source")
    if own is not None and not (isinstance(own, str) and own.strip()):
        raise ValueError(f"{name}.name is a text")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not math.isfinite(scale) or not 0 < abs(scale) <= MAX_SCALE:
        raise ValueError(f"{name}.scale is a number up to {MAX_SCALE:g}, and not 0")
    return Adapter(source=source, scale=float(scale), name=own)


def check_known(adapter: str, adapters: Iterable[str]) -> None:
    """Check that an adapter is one of those of a model; no name is the model alone.

    Raises:
        UnknownModel: it is not.
    """
    if adapter and adapter not in {*adapters}:
        listed = ", ".join(adapters) or "none"
        raise UnknownModel(f"The model has no adapter {adapter!r}; it has {listed}.", param="model")


def names_of(model: str, adapter: str, settings: Adapter) -> tuple[str, ...]:
    """Return the names that requests use for an adapter of a model; answers have the first."""
    full = f"{model}{SEPARATOR}{adapter}"
    return (full,) if settings.name is None else tuple(dict.fromkeys((settings.name, full)))


def adapters_by_name(model: str, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Return the adapters of a model, by each name that requests use."""
    return {
        name: adapter
        for adapter, settings in adapters.items()
        for name in names_of(model, adapter, settings)
    }
