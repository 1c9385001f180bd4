"""How large the source is, and how many layers a request passes.

    scripts/measure [DIR] [--against DIR2] [--static] [--names]

One column for each checkout. Measuring tools are the packages `bench`, `tune`, `contract` and
`lab`; code lines are lines without blank lines, comments and docstrings. Forwarding methods are
those named by a verb of the Backend (VERBS) in classes that have its shape: none of the engines,
the command line and the protocol itself. The last rows are measured on a running service with the
echo engine: the files of which a function runs while a chat is streamed, and the async generators
that are stacked for one token (house_probe.py). `--static` leaves them out; `--names` lists what
was counted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TOOLS = ("bench", "tune", "contract", "lab")
VERBS = ("ask", "generate", "embed", "rerank", "count_tokens", "detokenize")
VERBS += ("generate_stream", "embed_raw")
_OTHER_SHAPES = ("engines", "cli", "testing.py")
TRACED_NAMES = ("min_p", "prefill_ms", "RerankRequest")
BUCKETS = (60, 120, 381, 401)
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER)
_LAYOUT += (tokenize.INDENT, tokenize.DEDENT)
_WINDOWS = 8
_SETTLE_S = 0.02

Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = Mapping[Path, set[Path]]


@cache
def tree(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _docstring_lines(path: Path) -> Iterator[int]:
    for node in ast.walk(tree(path)):
        if not isinstance(node, Function | ast.ClassDef | ast.Module) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def code_lines(path: Path) -> int:
    """Count the lines that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in _LAYOUT and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(_docstring_lines(path)))


def function_lengths(paths: Iterable[Path]) -> list[int]:
    """Return the lengths of all functions in lines, sorted."""
    nodes = (node for path in paths for node in ast.walk(tree(path)) if isinstance(node, Function))
    return sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)


def forwarding(paths: Iterable[Path], root: Path) -> list[str]:
    """Return the methods that repeat a verb of the Backend."""
    return [
        f"{path.relative_to(root)}:{owner.name}.{node.name}"
        for path in paths
        if path.relative_to(root).parts[0] not in (*_OTHER_SHAPES, *TOOLS)
        for owner in ast.walk(tree(path))
        if isinstance(owner, ast.ClassDef) and not _is_protocol(owner)
        for node in owner.body
        if isinstance(node, Function) and node.name in VERBS and not _is_overload(node)
    ]


def _is_protocol(node: ast.ClassDef) -> bool:
    return any("Protocol" in ast.unparse(base) for base in node.bases)


def _is_overload(node: Function) -> bool:
    return any(ast.unparse(item).endswith("overload") for item in node.decorator_list)


def messages(path: Path) -> list[str]:
    """Return the messages between a service and its workers' processes."""
    if not path.exists():
        return []
    classes = (node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))
    return [node.name for node in classes if "Message" in map(ast.unparse, node.bases)]


def naming(name: str, paths: Iterable[Path]) -> list[Path]:
    """Return the files in which a name occurs."""
    word = re.compile(rf"\b{name}\b")
    return [path for path in paths if word.search(path.read_text(encoding="utf-8"))]


def _imports(node: ast.AST, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield all imports, wherever in the file they are; `types` adds those for types only."""
    if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, types)


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(root: Path, *, types: bool = False) -> Graph:
    """Return which files of a package each of them imports; `root` is the package's folder.

    `types` adds the imports for type checkers.
    """
    modules = {_module(path, root): path for path in root.rglob("*.py")}

    def resolved(name: str) -> Path | None:
        return modules.get(name) or modules.get(name.rpartition(".")[0])

    return {
        path: {
            other
            for node in _imports(tree(path), types)
            for name in _imported(node)
            if (other := resolved(name)) is not None and other != path
        }
        for path in modules.values()
    }


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(root: Path, *, types: bool = False) -> list[tuple[str, ...]]:
    """Return the groups of files in one folder that import each other, by way of its files."""
    imports = graph(root, types=types)
    inside = {
        path: {other for other in others if other.parent == path.parent}
        for path, others in imports.items()
    }
    reached = {path: _reachable(path, inside) for path in inside}
    groups = {
        frozenset(other for other in reached[path] if path in reached[other])
        for path in inside
        if path in reached[path]
    }
    return sorted(tuple(sorted(str(path.relative_to(root)) for path in group)) for group in groups)


def _reachable(start: Path, inside: Graph) -> set[Path]:
    seen: set[Path] = set()
    ahead = [*inside[start]]
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            ahead += inside[path]
    return seen


class Row(NamedTuple):
    """A line of the table, and the names of what was counted."""

    label: str
    value: str
    names: Sequence[str] = ()


def _buckets(paths: Iterable[Path]) -> str:
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    places = Counter(sum(length >= bound for bound in BUCKETS) for length in lengths)
    return " / ".join(str(places[place]) for place in range(len(BUCKETS) + 1))


def _size(paths: list[Path]) -> str:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    return f"{lines:,} in {len(paths)} files"


def static_rows(directory: Path) -> Iterator[Row]:
    """Yield what can be counted without running anything."""
    root = directory / "src" / "headrace"
    paths = sorted(root.rglob("*.py"))
    house = [path for path in paths if path.relative_to(root).parts[0] not in TOOLS]
    yield Row("source", _size(paths))
    yield Row("source without measuring tools", _size(house))
    yield Row("lines of code", f"{sum(map(code_lines, paths)):,}")
    yield Row("lines of code without measuring tools", f"{sum(map(code_lines, house)):,}")
    yield Row("files under 60 / 120 / 381 / 401 lines / longer", _buckets(paths))
    lengths = function_lengths(paths)
    median, ninth = statistics.median(lengths), lengths[len(lengths) * 9 // 10]
    yield Row("function length: median / p90 / max", f"{median:g} / {ninth} / {lengths[-1]}")
    yield Row("tests", _size(sorted((directory / "tests").rglob("*.py"))))
    yield _count("forwarding methods", forwarding(paths, root))
    yield _count("messages on the wire", messages(root / "worker" / "wire.py"))
    for label, types in (("", False), (", with imports for types", True)):
        groups = [" - ".join(group) for group in circles(root, types=types)]
        yield _count(f"import circles inside folders{label}", groups)
    for name in TRACED_NAMES:
        files = [str(path.relative_to(root)) for path in naming(name, paths)]
        yield _count(f"files that name {name}", files)


def _count(label: str, names: Sequence[str]) -> Row:
    return Row(label, str(len(names)), names)


class Probe:
    """The switch of the recording, and the files that the processes have written."""

    def __init__(self, scratch: Path) -> None:
        self._switch = scratch / "switch"
        self._switch.write_bytes(b"\0")
        shutil.copy(Path(__file__).with_name("house_probe.py"), scratch / "sitecustomize.py")
        with self._switch.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), 1)

    def environment(self, directory: Path) -> dict[str, str]:
        """Return the environment of a service whose processes record themselves."""
        scratch = self._switch.parent
        kept = {name: text for name, text in os.environ.items() if not name.startswith("HEADRACE_")}
        return kept | {
            "HOME": str(scratch),
            "PYTHON_HOUSE_PROBE": str(self._switch),
            "PYTHONPATH": f"{scratch}{os.pathsep}{directory / 'src'}",
        }

    @contextlib.contextmanager
    def window(self, number: int) -> Iterator[None]:
        """Record under a number."""
        self._state[0] = number
        try:
            yield
        finally:
            self._state[0] = 0

    def findings(self, pid: int) -> dict[int, set[str]]:
        """Return by window what a process has recorded."""
        by_window: dict[int, set[str]] = {}
        path = Path(f"{self._switch}.{pid}")
        for line in path.read_text().splitlines() if path.exists() else ():
            number, _, finding = line.partition("\t")
            by_window.setdefault(int(number), set()).add(finding)
        return by_window

    def pids(self) -> list[int]:
        """Return the processes that have recorded something."""
        return [int(path.suffix[1:]) for path in self._switch.parent.glob("switch.*")]


@contextlib.contextmanager
def _service(probe: Probe, directory: Path) -> Iterator[tuple[int, int]]:
    """Serve the echo engine; yields the process id and the port."""
    command = [sys.executable, "-m", "headrace", "serve", "builtin:echo", "--port", "0"]
    process = subprocess.Popen(
        [*command, "-o", "tokens_per_second=50"],
        env=probe.environment(directory),
        cwd=probe.environment(directory)["HOME"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"on http://[^:]+:(\d+)", line):
                yield process.pid, int(match[1])
                return
        raise SystemExit(f"The service of {directory} does not start:\n{''.join(lines)}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _chat(port: int, text: str, probe: Probe, streaming: int = 0) -> None:
    """Stream a chat; the window `streaming` is open from the third token to the third last."""
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": text}]}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    tokens = 0
    with contextlib.ExitStack() as stack:
        for line in response:
            tokens += b'"content"' in line
            if streaming and tokens == 3:
                stack.enter_context(probe.window(streaming))
            if tokens == len(text) - 3:
                stack.close()
    connection.close()


def live_rows(directory: Path) -> Iterator[Row]:
    """Yield what a streamed chat passes, in the service and in the process of its model."""
    from house_probe import STREAMING

    with tempfile.TemporaryDirectory(prefix="house-") as scratch:
        probe = Probe(Path(scratch))
        with _service(probe, directory) as (service, port):
            for number in range(_WINDOWS + 2):
                # The first ones load the model and import what is missing.
                with probe.window(max(0, number - 1)):
                    _chat(port, "Hi there.", probe)
                    time.sleep(_SETTLE_S)
            _chat(port, "abcdefghijklmnop", probe, STREAMING)
        processes = {pid: probe.findings(pid) for pid in probe.pids()}
    own = processes.pop(service)
    # A process that is kept warm for the next load has recorded nothing.
    other = max(processes.values(), key=len)
    files = [_always(own), _always(other)]
    yield _pair("files of a streamed chat: service + child", files)
    stacks = [max(findings[STREAMING], key=len).split(" > ") for findings in (own, other)]
    yield _pair("async generators of a token: service + child", stacks)


def _always(findings: Mapping[int, set[str]]) -> list[str]:
    # Timers do not run in every window.
    windows = [findings.get(number, set[str]()) for number in range(1, _WINDOWS + 1)]
    return sorted(set.intersection(*windows))


def _pair(label: str, names: list[list[str]]) -> Row:
    return Row(label, " + ".join(str(len(part)) for part in names), [*names[0], *names[1]])


def table(columns: Mapping[str, Sequence[Row]]) -> str:
    """Return the rows of each checkout as columns of text."""
    values = {name: {row.label: row.value for row in rows} for name, rows in columns.items()}
    labels = list(dict.fromkeys(row.label for rows in columns.values() for row in rows))
    first = max(map(len, labels))
    widths = [max(map(len, [name, *column.values()])) for name, column in values.items()]
    lines = [("", list(columns))]
    lines += [(label, [column.get(label, "") for column in values.values()]) for label in labels]
    return "\n".join(
        "  ".join([label.ljust(first), *map(str.rjust, cells, widths)]) for label, cells in lines
    )


def main() -> None:
    """Print the table."""
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(
        prog="scripts/measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="?", type=Path, default=here, help="a checkout")
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--static", action="store_true", help="count only, start nothing")
    parser.add_argument("--names", action="store_true", help="list what was counted")
    options: Any = parser.parse_args()
    columns: dict[str, list[Row]] = {}
    for directory in filter(None, (options.directory, options.against)):
        place = directory.resolve()
        rows = [*static_rows(place), *(() if options.static else live_rows(place))]
        columns[place.name if place.name not in columns else str(place)] = rows
    print(table(columns))
    for name, rows in columns.items() if options.names else ():
        for row in filter(lambda row: row.names, rows):
            print(f"\n{name}: {row.label}", *row.names, sep="\n  ")


if __name__ == "__main__":
    main()
