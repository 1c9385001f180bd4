"""The shape of the house: what loads what, how long things are, and that the contract is cited."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import cast

import pytest
from benchmarks.house import circles

import headrace

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "headrace"
CONTRACT = {*(f"W{number}" for number in range(1, 24)), "W25", "W27", "W28"}
CONTRACT |= {*(f"M{number}" for number in range(1, 10)), *(f"T{number}" for number in range(1, 7))}
HEAVY = ("fastapi", "llama_cpp", "prometheus_client", "starlette", "torch", "transformers")
HEAVY += ("httptools", "vllm", "xllamacpp", "accelerate", "anthropic", "gguf", "numpy", "openai")
HEAVY += ("openvino", "openvino_genai", "sentence_transformers")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def functions(path: Path) -> Sequence[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def imports(path: Path) -> Iterator[str]:
    """Yields the top-level package of each import, wherever in the file it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


SOURCES = sorted(SOURCE.rglob("*.py"))

VERSION = """
from headrace.cli import main
sys.argv = ["headrace", "--version"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""


@pytest.mark.parametrize("statement", ["import headrace", VERSION], ids=["import", "--version"])
def test_that_nothing_heavy_is_loaded(statement: str) -> None:
    """Issue 2, shown 9; W1: no engine, no torch and no web framework is loaded for a look."""
    program = f"import sys\n{statement}\nprint('loaded', *sys.modules)"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("loaded")[2].split()
    assert "headrace" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(HEAVY)
    assert not [name for name in loaded if re.match(r"headrace\.engines\.(?!base$)", name)]


def test_that_the_public_names_are_sorted_and_there() -> None:
    assert list(headrace.__all__) == sorted(set(headrace.__all__))
    assert [name for name in headrace.__all__ if not hasattr(headrace, name)] == []


def test_that_the_core_imports_only_msgspec() -> None:
    allowed = {"headrace", "msgspec"} | sys.stdlib_module_names
    used = set(chain.from_iterable(imports(path) for path in (SOURCE / "core").glob("*.py")))
    assert "msgspec" in used
    assert used - allowed == set()


def test_that_files_of_one_folder_do_not_import_each_other() -> None:
    """No import leads back to its own file, not even one for the type checker alone."""
    assert [group for group in circles(SOURCE, types=True) if "__init__.py" not in group] == []


def test_that_circles_are_noticed(tmp_path: Path) -> None:
    root = tmp_path / "package"
    (root / "part").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "part" / "__init__.py").write_text("from package.part import a")
    (root / "part" / "a.py").write_text("def f():\n    from package.part.b import x")
    (root / "part" / "b.py").write_text("import package.part.c\nx = 1")
    (root / "part" / "c.py").write_text("from package.part import a")
    (root / "part" / "d.py").write_text("if TYPE_CHECKING:\n    from package.part import e")
    (root / "part" / "e.py").write_text("from package.part.d import y")
    assert circles(root) == [("part/a.py", "part/b.py", "part/c.py")]
    assert circles(root, types=True) == [*circles(root), ("part/d.py", "part/e.py")]


def test_that_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_that_functions_are_short() -> None:
    long = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert long == []


def test_that_functions_are_annotated() -> None:
    """Every function says what it takes and gives; `self` and `cls` need no word."""

    def bare(node: Function) -> bool:
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        taken += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        unsaid = [one for one in taken if not one.annotation and one.arg not in ("self", "cls")]
        return bool(unsaid) or node.returns is None

    places = [(path, node) for path in SOURCES for node in functions(path) if bare(node)]
    assert [f"{relative(path)}:{node.lineno}" for path, node in places] == []


def test_that_most_functions_are_very_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1 for path in SOURCES for node in functions(path)
    )
    assert lengths[len(lengths) // 2] < 10
    assert lengths[len(lengths) * 9 // 10] < 30
    assert lengths[-1] <= 46


def broad(path: Path) -> Iterator[ast.ExceptHandler]:
    """Yields each `except Exception`."""
    for node in ast.walk(tree(path)):
        named = node.type if isinstance(node, ast.ExceptHandler) else None
        if named and ast.unparse(named) == "Exception":
            yield cast("ast.ExceptHandler", node)


def test_that_broad_handlers_have_a_reason() -> None:
    """A comment stands beside `except Exception` or in the line below it."""
    bare: list[str] = []
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        places = [node.lineno for node in broad(path)]
        bare += [f"{relative(path)}:{at}" for at in places if "#" not in lines[at - 1] + lines[at]]
    assert bare == []


def test_that_few_broad_handlers_do_not_raise() -> None:
    kept = [
        f"{relative(path)}:{handler.lineno}"
        for path in SOURCES
        for handler in broad(path)
        if not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    ]
    # One where each thread of an engine ends, where somebody has to be told of it, and where who
    # only looks on must not fail a request.
    assert len(kept) <= 12, kept


def test_that_the_contract_is_cited() -> None:
    """Issue 2, shown 8: each row that applies is named in the docstring of at least one test."""
    uncited, row = set(CONTRACT), re.compile(r"\b[WTM]\d+\b")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        # Most of a file's rows are cited by files before it: it need not be parsed.
        if uncited.isdisjoint(row.findall(path.read_text(encoding="utf-8"))):
            continue
        for node in functions(path):
            if node.name.startswith("test_"):
                uncited.difference_update(row.findall(ast.get_docstring(node) or ""))
    assert uncited == set()


def test_that_no_process_imports_from_the_current_folder() -> None:
    """A file there with the name of a library would be run: Python's -P leaves the folder out."""
    commands = re.compile(r'sys\.executable, (?!"-P")"-')
    found = [path.name for path in SOURCES if commands.search(path.read_text())]
    assert found == []
