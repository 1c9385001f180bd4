"""Models that lie on this machine already."""

from __future__ import annotations

from pathlib import Path

from headrace.core.errors import UnknownModel
from headrace.models.reference import LocalReference


def locate(reference: LocalReference) -> Path:
    """Return the path, which exists.

    Raises:
        UnknownModel: nothing is there.
    """
    path = Path(reference.path)
    if path.exists():
        return path
    last = "/".join(path.parts[-2:])
    message = f"There is nothing at {path}. For a repository on the hub write hub:{last}."
    raise UnknownModel(message, param="model")
