"""Hints to install an extra: they fit the installation, and the extras are there."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from headrace import engines
from headrace.core.install import install_command

ROOT = Path(__file__).resolve().parents[2]
CLONE: dict[str, Any] = {"url": "file:///src/my%20clone", "dir_info": {"editable": True}}
GIT: dict[str, Any] = {
    "url": "https://example.com/headrace",
    "vcs_info": {"vcs": "git", "commit_id": "abc"},
}


@pytest.mark.parametrize(
    ("origin", "installer", "beside", "command"),
    [
        (None, "pip", "", "PIP install 'headrace[x]'"),
        (CLONE, "pip", "", "PIP install -e '/src/my clone[x]'"),
        (CLONE | {"dir_info": {}}, "pip", "", "PIP install '/src/my clone[x]'"),
        (GIT, "pip", "", "PIP install 'headrace[x] @ git+https://example.com/headrace@abc'"),
        (
            {"url": "https://e.com/h.whl"},
            "pip",
            "",
            "PIP install 'headrace[x] @ https://e.com/h.whl'",
        ),
        (CLONE, "uv", "", "uv pip install -e '/src/my clone[x]'"),
        (None, "uv", "uv-receipt.toml", "uv tool install 'headrace[x]'"),
        (None, "pip", "pipx_metadata.json", "pipx install --force 'headrace[x]'"),
    ],
)
def test_a_hint_fits_the_installation(
    origin: dict[str, Any] | None,
    installer: str,
    beside: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 12.31: from a clone, an index or an address; by pip, uv or pipx."""
    (tmp_path / "INSTALLER").write_text(f"{installer}\n")
    if origin:
        (tmp_path / "direct_url.json").write_text(json.dumps(origin))
    if beside:
        (tmp_path / beside).touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(metadata, "distribution", lambda _: metadata.Distribution.at(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert install_command("x") == command.replace("PIP", f"{sys.executable} -m pip")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_command("x") == command.replace("PIP", "pip")


def test_in_a_clone_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 12.31: this checkout is itself installed from a clone."""
    monkeypatch.chdir(ROOT)
    assert install_command("openvino", "otlp").endswith("pip install -e '.[openvino,otlp]'")
    assert install_command(package="numpy").endswith("pip install 'numpy'")


def test_what_was_not_installed_has_a_hint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command("x").endswith("pip install 'headrace[x]'")


def test_every_extra_that_is_named_exists() -> None:
    """Issue 12.31: in the source, the docs and the scripts."""
    known = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    texts = [
        path.read_text()
        for folder in ("src", "docs", "scripts", "benchmarks", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yml", "") and path.is_file()
    ]
    texts += [path.read_text() for path in ROOT.glob("*.md")]
    patterns = (
        r"(?:headrace|['\" ]\.)\[([a-z_,-]+)\]",
        r"""install_command\(((?:["'][a-z_-]+["'](?:, )?)+)\)""",
    )
    named = {
        name
        for text in texts
        for pattern in patterns
        for match in re.findall(pattern, text)
        for name in re.findall(r"[a-z_-]+", match)
    }
    named |= {extra for name in engines.names() if (extra := engines.about(name).extra)}
    assert {"openvino", "otlp", "bench", "transformers"} <= named
    assert named - known == set()
