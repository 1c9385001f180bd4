"""Engines of other packages, as an installation would bring them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest


def bring_engine(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package with one engine in `folder`, found by this process and its children."""
    about = folder / f"{name}-1.dist-info"
    about.mkdir(parents=True)
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[headrace.engines]\n{name} = {name}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
