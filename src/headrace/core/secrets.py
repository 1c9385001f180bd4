"""What may be told of a setting, where its value may be a secret."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

_WORDS = frozenset({"key", "keys", "token", "secret", "password"})


def masked(key: str, value: Any) -> Any:
    """Return a value as JSON to be printed; of a secret the first digits of its hash, if any."""
    if hasattr(value, "get_secret_value"):  # pydantic's
        return "…"
    if isinstance(value, list | tuple):
        return [masked(key, item) for item in cast("Iterable[Any]", value)]
    if not value or key.rpartition(".")[2].rpartition("_")[2] not in _WORDS:
        return str(value) if isinstance(value, Path) else value
    text = str(value)
    return f"{text[:11]}…" if text.startswith("sha256:") else "…"


def shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they may be told to anybody."""
    return {key: masked(key, value) for key, value in options.items()}
