"""SECURITY.md: its limits are those of the code, and the tests that it names exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from tests.conftest import ROOT

from headrace import config
from headrace.cli.serve import listen
from headrace.config.tree import TABLES, ServerSettings
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "headrace"
UNITS = {"s": 1, "min": 60, "h": 3600, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
WORDS = {"none": None, "the engine's": None, "the machine's": None, "off": False}
# Not limits of what comes from outside: how far answers of two engines may differ, and the default
# of a setting.
OTHERS = {"engines.measured.MAX_DISTANCE", "api.limits.MAX_IDLE_CONNECTIONS"}


def rows(columns: str) -> list[list[str]]:
    """Return the rows of all tables with this heading, by cells."""
    tables = re.findall(rf"^\| {columns} \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def limits() -> Iterator[tuple[str, str]]:
    """Yield each name and its value as written; one value may be that of all names of a row."""
    for _, default, names in rows("limit \\| default \\| setting or constant"):
        keys, values = re.findall(r"`([^`]+)`", names), default.split(", ")
        yield from zip(keys, values * len(keys) if len(values) == 1 else values, strict=True)


def written(text: str) -> Any:
    """Return what a value of the page means."""
    if text in WORDS:
        return WORDS[text]
    if power := re.fullmatch(r"(\d+)\^(\d+)", text):
        return int(power[1]) ** int(power[2])
    if number := re.fullmatch(r"([\d,]+)(?: (\w+))?", text):
        return int(number[1].replace(",", "")) * UNITS.get(number[2] or "", 1)
    return text


def in_the_code(name: str) -> Any:
    """Return the default of a setting, or the value of a constant, a field or an argument."""
    table, _, key = name.partition(".")
    if table in TABLES and key in TABLES[table].model_fields:
        return TABLES[table].model_fields[key].default
    if table == "models" and key in ModelSpec.__struct_fields__:
        return _of_a_struct(ModelSpec, key)
    place, _, last = name.rpartition(".")
    kind: Any
    module, _, owner = place.rpartition(".")
    if not owner[:1].isupper():
        return getattr(importlib.import_module(f"headrace.{place}"), last)
    kind = getattr(importlib.import_module(f"headrace.{module}"), owner)
    if issubclass(kind, BaseModel) and last in kind.model_fields:
        return kind.model_fields[last].default
    return getattr(kind, last, None) or inspect.signature(kind).parameters[last].default


def _of_a_struct(kind: type[msgspec.Struct], name: str) -> Any:
    field = next(field for field in msgspec.structs.fields(kind) if field.name == name)
    factory = field.default_factory
    return field.default if factory is msgspec.NODEFAULT else factory()


@pytest.mark.parametrize(("name", "text"), [*limits()])
def test_limits_are_those_of_the_code(name: str, text: str) -> None:
    """Issue 11, what it must show 4: every limit with its default."""
    assert (in_the_code(name) or None) == (written(text) or None)


def test_every_limit_is_in_the_page() -> None:
    """Constants that are named as limits; new ones are added to the page."""
    kinds = re.compile(r"(MAX|MOST|LONGEST)_|[A-Z]\w*_TIMEOUT_S$")
    named = {name for name, _ in limits()} | OTHERS
    missing: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            missing += [f"{module}.{name}" for name in names if kinds.match(name)]
    assert len(missing) > 50
    assert [name for name in missing if name not in named] == []


def test_the_named_tests_exist() -> None:
    """A fault that no test keeps out is marked with `none`."""
    faults = rows("fault \\| published, for example \\| here \\| tests")
    assert len(faults) > 25
    for fault, _, _, cell in faults:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
        assert tests or cell == "none", fault
        for path, name in tests:
            source = (ROOT / "tests" / path).read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), (path, name)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key is set"):
        listen(ServerSettings(host=host, port=0))
    listen(ServerSettings(host=host, port=0, admin_keys=("key",))).close()


@pytest.mark.parametrize("change", ["base_url", "api_key", "api_key_env"])
def test_no_upstream_comes_over_the_network(tmp_path: Path, change: str) -> None:
    """An admin key cannot send the service's keys, or its requests, to an address of its own."""
    settings = config.load(environ={"HEADRACE_HOME": str(tmp_path)}, cwd=tmp_path)
    for given in ({change: "http://x"}, {"options": {change: "http://x"}}):
        with pytest.raises(ConfigError, match="is set in the configuration only"):
            settings.changed("openai:gpt", given)


def test_nothing_is_unpickled() -> None:
    """Nothing that could run code is decoded, and no source is evaluated."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names.append(node.func.id)
            assert not {"pickle", "marshal", "shelve", "dill", "eval", "exec"} & {*names}, path


def test_programs_that_are_started_get_a_list_of_variables() -> None:
    """Issue 11.12: not the environment of the service, with its secrets."""
    folders = ("api", "engines", "fronts", "machine", "models", "pool", "text", "worker")
    files = [path for folder in folders for path in (SOURCE / folder).rglob("*.py")]
    started = re.compile(r"(?:subprocess\.(?:run|Popen)|create_subprocess_\w+)\(")
    calls = [
        (path.name, ast.unparse(node))
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and started.search(ast.unparse(node.func) + "(")
    ]
    assert len(calls) >= 8
    assert [name for name, call in calls if "env=" not in call] == []
