"""The command that installs an extra."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec


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
