"""Whether the installed libraries are those that the extras of Headrace ask for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def unfit(extra: str | None, library: str) -> str:
    """Return what is installed of an extra in a version that it does not allow; "" if nothing is.

    Without an extra it is what Headrace itself needs of the package that has `library`.
    """
    installed = ((wanted, _version(wanted.name)) for wanted in _wanted(extra, library))
    return "; ".join(
        f"{wanted.name} {version}, where {wanted.specifier} is needed"
        for wanted, version in installed
        if version is not None and not wanted.specifier.contains(version, prereleases=True)
    )


def _wanted(extra: str | None, library: str) -> Iterator[Requirement]:
    for wanted in map(Requirement, _requirements()):
        if _is_of(wanted, "") and extra is None:
            if canonicalize_name(wanted.name) == canonicalize_name(library):
                yield wanted
        elif extra is not None and not _is_of(wanted, "") and _is_of(wanted, extra):
            yield wanted


def _is_of(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _requirements() -> list[str]:
    try:
        return metadata.requires("headrace") or []
    except metadata.PackageNotFoundError:
        # The source is used as it is.
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
