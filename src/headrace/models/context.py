"""How many tokens a model was made for, out of what its files say."""

from __future__ import annotations

NO_LIMIT = 100_000_000
"""Tokenizers write huge numbers where they mean "no limit"."""


def effective(
    limit: float | None,
    *,
    kind: str | None = None,
    factor: float | None = None,
    original: float | None = None,
    architecture: str = "",
) -> int | None:
    """Return the context length in tokens with rope scaling counted in, or None.

    With an `original` length the scaled one is original * factor; the larger of it and `limit`
    counts, because some models state the scaled length already. Without one, linear, dynamic and
    yarn scaling stretch `limit` itself, save in Gemma 3, which states the stretched one.
    """
    if limit is not None and not 0 < limit < NO_LIMIT:
        limit = None
    stretched = limit or 0
    if factor is not None and 1 <= factor < NO_LIMIT and kind not in (None, "none", "default"):
        if original is not None:
            stretched = max(stretched, original * factor)
        elif kind in ("linear", "dynamic", "yarn") and not architecture.startswith("gemma3"):
            stretched *= factor
    return int(stretched) if 0 < stretched < NO_LIMIT else None
