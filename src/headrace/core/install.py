"""Extras: what is installed of them, and the command that installs one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def install_command(*extras: str, package: str = "") -> str:
    """Return the shell command that installs extras of Headrace, or another package beside it.

    It fits how Headrace was installed: from a clone, an address or an index; by pip, uv or pipx.
    """
    if (Path(sys.prefix) / "uv-receipt.toml").exists():
        command, inject = "uv tool install", "uv tool install headrace --with"
    elif (Path(sys.prefix) / "pipx_metadata.json").exists():
        command, inject = "pipx install --force", "pipx inject headrace"
    else:
        command = inject = _pip()
    if package:
        return f"{inject} '{package}'"
    return f"{command} {_requirement(','.join(extras))}"


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


def _pip() -> str:
    if _recorded("INSTALLER").strip() == "uv":
        return "uv pip install"
    # Another environment's pip may come first on the path.
    pip = shutil.which("pip")
    is_own = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip install" if is_own else f"{sys.executable} -m pip install"


def _requirement(extras: str) -> str:
    try:
        origin = msgspec.json.decode(_recorded("direct_url.json"), type=dict[str, Any])
    except msgspec.DecodeError:
        return f"'headrace[{extras}]'"
    url = str(origin.get("url"))
    if (folder := origin.get("dir_info")) is not None:
        clone = Path(unquote(urlsplit(url).path))
        place = "." if clone == Path.cwd() else clone
        return f"{'-e ' if folder.get('editable') else ''}'{place}[{extras}]'"
    if source := origin.get("vcs_info"):
        url = f"{source['vcs']}+{url}@{source.get('requested_revision') or source['commit_id']}"
    return f"'headrace[{extras}] @ {url}'"


def _recorded(name: str) -> str:
    """Return what the installer has written about Headrace; "" if it is not installed."""
    try:
        return metadata.distribution("headrace").read_text(name) or ""
    except metadata.PackageNotFoundError:
        return ""
