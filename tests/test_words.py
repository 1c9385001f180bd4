"""The words of the source and the documentation: the field's terms, in plain English.

python tests/test_words.py [LABEL]      counts by file, of all words; or the lines of one
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

Kind = Literal["name", "docstring", "text"]


class Word(NamedTuple):
    """A word that is not used, and what stands for it.

    `pattern` is searched in each name (of a file, class, function, variable, attribute), in each
    docstring's beginning, or in all texts: docstrings, comments, strings and pages.
    """

    kind: Kind
    pattern: str
    instead: str


WORDS = {
    # Names of types, each with the term that is used for it.
    "Seat": Word("name", r"(?i)(^|_)seats?(_|$)|Seat", "ModelEntry, entry"),
    "Line": Word("name", r"^_?Line$", "Queue"),
    "Waiter": Word("name", r"(?i)waiter", "Ticket"),
    "Room": Word("name", r"^_?Room$", "MemoryQueue"),
    "Feed": Word("name", r"^_?Feed$", "EventBus"),
    "Watch": Word("name", r"^_?Watch$", "Observer"),
    "Watcher": Word("name", r"(?i)(^|_)watchers?(_|$)|Watcher", "Recorder"),
    "Seen": Word("name", r"^_?Seen$", "Observation"),
    "Unseen": Word("name", r"(?i)unseen", "NullObservation"),
    "Nobody": Word("name", r"(?i)nobody|somebody|everybody", "NullObserver, or what it is"),
    "Observed": Word("name", r"^_?Observed$", "a pool of one"),
    "standing": Word("name", r"(?i)(^|_)standing(_|$)|Standing", "gauges"),
    "Spare": Word("name", r"^_?Spare$", "WarmProcess"),
    "took_ill": Word("name", r"took_ill|(^|_)ailing", "mark_unhealthy, unhealthy"),
    "Form": Word("name", r"^_?(Form|Frames)$", "ChunkEncoder"),
    "_SOFT": Word("name", r"^_SOFT$|LIKE_A_SETTING", "LIVE_SETTINGS, TRACED_SETTINGS"),
    # Variables without content.
    "one": Word("name", r"^_?one$", "what it is: model, entry, item"),
    "found": Word("name", r"^_?found$", "what was found: match, path, file"),
    "told": Word("name", r"^_?told$", "what it holds: attributes, options"),
    "said": Word("name", r"^_?said$", "what it holds: text, reply"),
    "asked": Word("name", r"^_?asked$", "request, requested"),
    "what": Word("name", r"^_?what$", "what it is: event, action, label"),
    "somebody's": Word("name", r"^_?(whom?|whose)$", "what it is: client, owner"),
    # Docstrings say what a function returns, yields, raises or does.
    "Tell": Word("docstring", r"^Tells?\b", "Return, Yield, Raise, Whether, Describe"),
    "Have": Word("docstring", r"^Have\b", "the verb itself"),
    "Say": Word("docstring", r"^Says?\b", "Return, Write, Describe"),
    # Phrases.
    "nobody": Word("text", r"(?i)\b(some|no|any|every)body\b", "the process, client or caller"),
    "look on": Word("text", r"(?i)\blook(s|ing|ed)? on\b", "observe"),
    "Say it in": Word("text", r"(?i)\bsay it in\b|\bin \w+'s words\b", "translate to"),
    "how it stands": Word("text", r"(?i)\bhow (it|they|things) stands?\b", "state"),
    "fared": Word("text", r"(?i)\bfare[sd]?\b", "failure history, result"),
    "ill": Word("text", r"(?i)\b(took|fell|falls?|is) ill\b|\bailing\b", "unhealthy"),
    "lets go": Word("text", r"(?i)\blets? (\w+ )?go\b", "release"),
    "afar": Word("text", r"(?i)\bfrom afar\b", "over the network"),
    "for ever": Word("text", r"(?i)\bfor ever\b", "forever, without end"),
    "to be told": Word(
        "text", r"(?i)\b(is|are|be|was|were) told\b", "reported, passed, configured"
    ),
    "who asks": Word("text", r"(?i)\bwho(ever)? (asks?|answers?|waits?)\b", "client, backend"),
    "seat": Word("text", r"(?i)\bseats?\b", "entry"),
    "whoever": Word("text", r"(?i)\bwhoever\b", "anyone who"),
    "mend": Word("text", r"(?i)\bmend(s|ed)?\b", "fix, repair"),
    "tell of": Word("text", r"(?i)\btells? of\b", "report, describe"),
    "stands": Word("text", r"(?i)\bstands? (in|on|at|there|here|beside|below|above)\b", "is"),
}


class Place(NamedTuple):
    """A use of a word."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        """Write it so that editors find it."""
        return f"{self.file}:{self.line}: {self.text}"


Units = dict[Kind, list[Place]]


def _file(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def of_source(path: Path) -> Units:
    """Return the names, the beginnings of docstrings and the lines of text of a Python file."""
    file, source = _file(path), path.read_text(encoding="utf-8")
    names, comments = [Place(file, 1, path.stem)], list[Place]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            names.append(Place(file, token.start[0], token.string))
        elif token.type == tokenize.COMMENT:
            comments.append(Place(file, token.start[0], token.string))
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        Place(file, getattr(node, "lineno", 1), text.partition("\n")[0])
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node))
    ]
    strings = [
        Place(file, node.lineno + number, line.strip())
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for number, line in enumerate(node.value.splitlines())
    ]
    return {"name": names, "docstring": docstrings, "text": comments + strings}


def of_page(path: Path) -> Units:
    """Return the lines of a page."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    text = [Place(_file(path), number, line) for number, line in lines]
    return {"name": [], "docstring": [], "text": text}


@cache
def _everything() -> Sequence[Units]:
    sources = sorted((ROOT / "src").rglob("*.py"))
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    pages.append(ROOT / "benchmarks" / "README.md")
    return [*map(of_source, sources), *map(of_page, pages)]


@cache
def _texts(kind: Kind) -> frozenset[str]:
    """Return all texts of a kind, each once: most names are used often."""
    return frozenset(place.text for unit in _everything() for place in unit[kind])


def uses(word: Word, units: Sequence[Units]) -> Iterator[Place]:
    """Yield each use of a word."""
    pattern = re.compile(word.pattern)
    return (place for unit in units for place in unit[word.kind] if pattern.search(place.text))


@pytest.mark.parametrize("label", WORDS)
def test_that_a_word_is_not_used(label: str) -> None:
    word = WORDS[label]
    if any(map(re.compile(word.pattern).search, _texts(word.kind))):
        places = [*map(str, uses(word, _everything()))]
        raise AssertionError(f"instead: {word.instead}\n" + "\n".join(places))


def test_that_uses_are_noticed(tmp_path: Path) -> None:
    """What holds for the source would be worth nothing if the search were blind."""
    path = tmp_path / "seat.py"
    path.write_text(
        '"""Tell how it stands."""\n\n\nclass Seat:  # of nobody\n    """Fine."""\n\n'
        '    def a(self, found: int) -> str:\n        return f"{found} is told\\nfor ever"\n'
    )
    units = [of_source(path)]
    lines = {
        label: [place.line for place in uses(word, units)]
        for label, word in WORDS.items()
        if any(uses(word, units))
    }
    assert lines == {
        "Seat": [1, 4],
        "found": [7, *([8] if sys.version_info >= (3, 12) else [])],
        "Tell": [1],
        "nobody": [4],
        "how it stands": [1],
        "for ever": [9],
        "to be told": [8],
    }


def test_that_the_glossary_is_short() -> None:
    """Issue 10.6: a stranger learns twenty terms at most."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.partition("## Glossary")[2].count("\n| ")
    assert 10 <= rows - 1 <= 20  # the first row is the head of the table


def report() -> Iterator[str]:
    """Yield the counts of all words by file."""
    for label, word in WORDS.items():
        files = Counter(place.file for place in uses(word, _everything()))
        yield f"{label} ({word.kind}): {files.total()}; instead: {word.instead}"
        yield from (f"  {count:4} {file}" for file, count in files.most_common())


def main(label: str | None = None) -> None:
    """Print the report, or the uses of one word, a line each."""
    lines = report() if label is None else map(str, uses(WORDS[label], _everything()))
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main(*sys.argv[1:2])
