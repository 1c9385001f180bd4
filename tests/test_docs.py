"""The examples in the README and the docs run, and the links and files that they name exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import MODEL_HOME, ROOT
from tests.service.serving import served

PAGES = ("README.md", "docs/getting-started.md", "docs/coming-from.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"HEADRACE_HOME": str(MODEL_HOME), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_of_a_page_runs(block: str, smollm2_path: Path) -> None:
    """W9, W10: the snippets of the issue and the docs do what they say."""
    if "11511" not in block:
        assert run(block).strip()
        return
    with served("smollm2", "--context-length", "512") as service:
        assert run(block.replace("http://127.0.0.1:11511", service.url)).strip()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    """A path may leave out `src/headrace/` and, in a table of one folder, that folder."""
    folders = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks"]
    files = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")}
    names = re.findall(r"`([a-z_/]+\.py)`", (ROOT / page).read_text())
    assert len(names) > 10
    assert [
        name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ] == []
