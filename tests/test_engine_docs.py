"""Each engine has a page, and its table of options is that of its `Options`.

`UPDATE_DOCS=1 scripts/test tests/test_engine_docs.py` writes the tables.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.conftest import ROOT

from headrace import engines

PAGES = ROOT / "docs" / "engines"
MARKED = re.compile(r"(?<=<!-- options -->\n).*?(?=<!-- /options -->)", re.DOTALL)
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
}


def table(options: type[BaseModel]) -> str:
    """The options in Markdown: name, what is accepted, default, meaning."""
    fields: dict[str, dict[str, Any]] = options.model_json_schema().get("properties", {})
    rows = [
        f"| `{name}` | {_accepted(field)} | {_default(field.get('default'))} "
        f"| {_escaped(field.get('description', ''))} |\n"
        for name, field in fields.items()
    ]
    return "\n| option | accepts | default | |\n|---|---|---|---|\n" + "".join(rows) + "\n"


def _accepted(field: dict[str, Any]) -> str:
    ways = [way for way in field.get("anyOf", [field]) if way.get("type") != "null"]
    return " or ".join(_way(way) for way in ways)


def _way(way: dict[str, Any]) -> str:
    if "enum" in way:
        return ", ".join(f"`{value}`" for value in way["enum"])
    if "const" in way:
        return f"`{way['const']}`"
    kinds = {"string": "text", "object": "table", "array": "list", "boolean": "true or false"}
    kind = str(way.get("type", "anything"))
    told = [kinds.get(kind, kind)]
    told += [text.format(_number(way[key])) for key, text in _BOUNDS.items() if key in way]
    return _escaped(", ".join(told))


def _default(value: object) -> str:
    if value is None or value in ("", [], {}):
        return ""
    told = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"`{told or _number(value)}`"


def _number(value: object) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole and isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


@pytest.mark.parametrize("name", engines.names())
def test_the_table_of_options_is_that_of_the_engine(name: str) -> None:
    """Issue 4, shown 5: the page of an engine says what `Options` says."""
    page = PAGES / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert MARKED.search(text), f"{page.name} has no <!-- options --> and <!-- /options -->"
    expected = MARKED.sub(lambda found: table(engines.options(name)), text)
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected, f"UPDATE_DOCS=1 scripts/test {Path(__file__).relative_to(ROOT)}"


def test_each_extra_that_is_named_exists() -> None:
    """A hint to install what does not exist helps nobody."""
    root = ROOT
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("src/**/*.py")]
    named = {
        extra.strip()
        for page in pages
        for group in re.findall(r"headrace\[([a-z_,\s-]+)\]", page.read_text())
        for extra in group.split(",")
    }
    assert named
    assert named <= project["optional-dependencies"].keys()
