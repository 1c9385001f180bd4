"""The pages for users of other servers: what they name of Headrace exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.conftest import ROOT

from headrace import config, engines
from headrace.api.app import ADMIN_ROUTES, ROUTES
from headrace.api.chat import ChatRequest
from headrace.cli.app import application
from headrace.config.sources import RESERVED
from headrace.config.tree import Config, ServerSettings
from headrace.core.model import ModelSpec

PAGES = sorted((ROOT / "docs").glob("coming-from-*.md"))
PAGES = [page for page in PAGES if "dbgpt" not in page.name]
COMMANDS: dict[str, Any] = typer.main.get_command(application()).commands  # type: ignore[attr-defined]
SETTINGS = {*ServerSettings.model_fields, *Config.model_fields, *ModelSpec.__struct_fields__}
FIELDS = {*SETTINGS, *ChatRequest.__struct_fields__}
PATHS = {route.path.partition("{")[0].rstrip("/") for route in (*ROUTES, *ADMIN_ROUTES)}
PATHS |= {"/metrics"}
# Not ours: other packages, and variables of OpenTelemetry.
OTHERS = {
    "openai",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "num_ctx",
    "headrace.toml",
    "reasoning_content",
} | {*("parent", "root")}


def options() -> set[str]:
    """Return the options of all engines."""
    return {name for engine in engines.names() for name in engines.options(engine).model_fields}


def flags(command: str) -> set[str]:
    return {flag for param in COMMANDS[command].params for flag in param.opts}


def is_known(name: str, known: set[str]) -> bool:
    """Whether a text in backticks is a command, a flag, a route, a variable or a setting."""
    if name.startswith("headrace "):
        _, command, *rest = shlex.split(name)
        given = [word for word in rest if word.startswith("-") and word != "-1"]
        return command.rstrip(".") in COMMANDS and {*given} <= flags(command)
    if name.startswith("--"):
        return name.partition(" ")[0] in flags("serve")
    if name.startswith("/"):
        return name.rstrip("/.") in PATHS or any(path.startswith(name[:4]) for path in PATHS)
    if name.startswith("HEADRACE_"):
        return name in RESERVED or name[9:].lower() in SETTINGS
    if re.match(r'"?\w+:|\[', name) or name.startswith("http"):
        return True
    return name.partition(" ")[0] in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_of_headrace_exists(page: Path) -> None:
    """Issue 14: their setting, ours."""
    rows = re.findall(r"^\|.*\|([^|]*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(names) > 12
    known = FIELDS | options() | OTHERS
    assert [name for name in sorted(names) if not is_known(name, known)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_configuration_of_a_page_is_read(page: Path, tmp_path: Path) -> None:
    """Issue 14: every setting in it is one, and so is every option of an engine."""
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        file = tmp_path / "headrace.toml"
        file.write_text(block.replace("<64 hexadecimal digits>", "0" * 64))
        settings = config.load(file=file, environ={})
        for name in settings.config.models:
            assert settings.model_spec(name).name == name
