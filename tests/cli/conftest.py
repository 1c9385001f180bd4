"""What the tests of the program share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    return {**kept, "HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": ""}


@pytest.fixture
def as_environ(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands that need no process of their own: what those would be given."""
    monkeypatch.chdir(environ["HOME"])
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, environ[name])
