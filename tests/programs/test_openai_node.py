"""OpenAI's package for Node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.programs.conftest import PREFIX
from tests.programs.test_programs import run

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]
MODULES = PREFIX / "node" / "node_modules"


def test_streams_tools_and_errors(
    url: str, environ: dict[str, str], folder: Path, record_property: Callable[[str, object], None]
) -> None:
    """Issue 14, shown 1: chat completions and responses, whole and streamed."""
    about = json.loads((MODULES / "openai" / "package.json").read_text())
    record_property("client", "openai-node")
    record_property("version", about["version"])
    record_property("tried", "tools")
    (folder / "node_modules").symlink_to(MODULES.resolve())
    shutil.copy(Path(__file__).with_name("openai.mjs"), folder)
    run(("node", "openai.mjs", f"{url}/v1"), environ, folder)
