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
# Nor are these: of what is shown and logged of something; of waits and tries of this side; of
# what it makes itself, has measured, or asks an engine for; of numbers.
OTHERS |= {
    *("core.schema._LONGEST_PATH", "core.wording._MAX_VALUE", "engines.remote._LONGEST_MESSAGE"),
    *("text.renderer._MAX_REASON", "cluster.reports._MOST_SKIPPED"),
    *("api.batch.work._LONGEST_WAIT_S", "cluster.detached._LONGEST_DELAY_S"),
    *("cluster.link._LONGEST_DELAY_S", "cluster.placing._LONGEST_S", "cluster.route._MAX_REFUSALS"),
    *("fronts.fronts._LONGEST_DELAY_S", "telemetry.usage._LONGEST_PAUSE_S"),
    *("cluster.view._MAX_CANDIDATES", "config.tree._MOST_FRONTS", "core.device._MAX_GPUS"),
    *("core.device._MAX_CHOICES", "core.media._MOST_TOKENS", "core.values._LONGEST_S"),
    *("engines.drafting._LONGEST_PAUSE", "engines.llamacpp.link._MAX_ADDRESS"),
    *("engines.llamacpp.pieces._MAX_MARKER", "engines.llamacpp.server._MAX_LOG"),
    *("engines.plan._MOST_BYTES", "engines.vllm.call._MAX_TEMPERATURE"),
    *("pool.queue._LONGEST_FORECAST", "worker.prompt._MAX_MISSING_BYTES"),
    *("worker.sizing._MAX_RESOLVED", "text.calls.raw._MAX_DEPTH", "text.calls.shapes._MAX_DEPTH"),
    *("text.calls.trim._MAX_HELD", "api.dbgpt.cluster._LEAVE_TIMEOUT_S"),
}
TOOLS = {"cli", "lab"}


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
    value, meant = in_the_code(name), written(text)
    # Where nothing is listed there is none, or what the machine has.
    value = None if value in ((), {}) else value
    assert value == meant
    # 0 is no word for none or off.
    assert isinstance(value, bool) == isinstance(meant, bool)


def assigned(targets: list[ast.expr]) -> Iterator[ast.expr]:
    """Yield the names that values are assigned to, also those of `A, B = 1, 2`."""
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else (target,)


def test_every_limit_is_in_the_page() -> None:
    """Constants that are named as limits; new ones are added to the page."""
    kinds = re.compile(r"_?(MAX|MOST|LONGEST)_|_?[A-Z]\w*_TIMEOUT_S$")
    named = {name for name, _ in limits()} | OTHERS
    missing: list[str] = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [each.id for each in assigned(targets) if isinstance(each, ast.Name)]
            # Those of the command line's tools that are no limits of a service have none.
            is_tool = parts[0] in TOOLS
            missing += [
                ".".join((*parts, name))
                for name in names
                if kinds.match(name) and not (is_tool and name.startswith("_"))
            ]
    assert len(missing) > 120
    assert {name for name in OTHERS if name not in missing} == set()
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
