"""The table of engines and abilities is what the engines declare.

`UPDATE_DOCS=1 scripts/test tests/test_abilities.py` writes it.
"""

from __future__ import annotations

import os
import re

from tests.conftest import ROOT

from headrace import engines
from headrace.core.model import ABILITIES, Capabilities
from headrace.core.sampling import Sampling

PAGE = ROOT / "docs" / "abilities.md"
MARKED = re.compile(r"(?<=<!-- abilities -->\n).*?(?=<!-- /abilities -->)", re.DOTALL)
KNOWN = (*Capabilities.__struct_fields__, *Sampling.__struct_fields__)
# The columns: of tasks, and of abilities once there are flags for them.
TASKS = {"tool calls": "generate", "thinking": "generate"}
ENCODERS = {"embeddings": "embed", "rerank": "rerank"}
FLAGS = {title: name for name, title in ABILITIES.items() if name in KNOWN}


def table() -> str:
    titles = ("engine", *TASKS, *FLAGS, *ENCODERS)
    rows = [titles, ["---"] * len(titles), *map(row, engines.names())]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + "\n"


def row(name: str) -> list[str]:
    about = engines.about(name)
    flags = [flag in about.able for flag in FLAGS.values()]
    generates, encodes = ([task in about.tasks for task in t.values()] for t in (TASKS, ENCODERS))
    has = [*generates, *flags, *encodes]
    return [f"[`{name}`](engines/{name}.md)", *("yes" if each else "-" for each in has)]


def test_the_table_is_what_engines_declare() -> None:
    """Issue 13, shown 6: each flag is a column, and each engine a row."""
    text = PAGE.read_text(encoding="utf-8")
    expected = MARKED.sub(lambda _: table(), text)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert "| engine |" in text
    assert text == expected, "UPDATE_DOCS=1 scripts/test tests/test_abilities.py"


def test_only_abilities_are_declared() -> None:
    """A misspelt word would be a column that nobody has."""
    for name in engines.names():
        assert engines.about(name).able <= ABILITIES.keys(), name


def test_flags_and_sampling_are_abilities() -> None:
    """A new flag of the capabilities has a title in `ABILITIES`."""
    flags = {
        name
        for name in Capabilities.__struct_fields__
        if getattr(Capabilities(), name) in (True, False)
    }
    assert flags - ABILITIES.keys() <= {"chat", "token_prompts", "batch_invariant"}
    able = Capabilities(sampling=frozenset({"logprobs", "seed"}), resume=True).abilities
    assert able == {"logprobs", "resume"}
