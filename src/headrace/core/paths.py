"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from headrace.core.errors import HeadraceError, InvalidRequest


def expanded(text: str | Path, wrong: type[HeadraceError] = InvalidRequest) -> Path:
    """Return the path, with the home that `~` or `~name` stands for.

    Raises:
        HeadraceError: of the class `wrong`, where there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise wrong(f"{str(text)!r}: whose home that is cannot be told.") from error
