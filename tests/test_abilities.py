"""The tables of abilities and of devices are what the engines declare.

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
MARKED = re.compile(r"<!-- (abilities|devices) -->\n.*?(?=<!-- /\1 -->)", re.DOTALL)
KNOWN = (*Capabilities.__struct_fields__, *Sampling.__struct_fields__)
# The columns: of tasks, and of abilities once there are flags for them.
TASKS = {"tool calls": "generate", "thinking": "generate"}
ENCODERS = {"embeddings": "embed", "rerank": "rerank"}
FLAGS = {title: name for name, title in ABILITIES.items() if name in KNOWN}
# The columns of the table of devices, and whose they are.
DEVICES = {
    "cpu": "`cpu`",
    "cuda": "`cuda` (NVIDIA)",
    "mps": "`mps` (Apple)",
    "rocm": "`rocm` (AMD)",
    "sycl": "`sycl` (Intel)",
    "vulkan": "`vulkan` (any GPU)",
    "remote": "another service",
}


def table(found: re.Match[str]) -> str:
    if found[1] == "abilities":
        titles, row = ("engine", *TASKS, *FLAGS, *ENCODERS), abilities
    else:
        titles, row = ("engine", *DEVICES.values()), devices
    rows = [titles, ["---"] * len(titles), *(line(name, row(name)) for name in engines.names())]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"<!-- {found[1]} -->\n\n{lines}\n"


def line(name: str, has: list[bool]) -> list[str]:
    return [f"[`{name}`](engines/{name}.md)", *("yes" if each else "-" for each in has)]


def devices(name: str) -> list[bool]:
    return [kind in engines.about(name).devices for kind in DEVICES]


def abilities(name: str) -> list[bool]:
    about = engines.about(name)
    flags = [flag in about.able for flag in FLAGS.values()]
    generates, encodes = ([task in about.tasks for task in t.values()] for t in (TASKS, ENCODERS))
    return [*generates, *flags, *encodes]


def test_the_tables_are_what_engines_declare() -> None:
    """Issue 13, shown 6, and 17, shown 7: flags and devices are columns, each engine is a row."""
    text = PAGE.read_text(encoding="utf-8")
    expected = MARKED.sub(table, text)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert text.count("| engine |") == 2
    assert text == expected, "UPDATE_DOCS=1 scripts/test tests/test_abilities.py"


def test_only_abilities_and_devices_are_declared() -> None:
    """A misspelt word would be a column that nobody has."""
    for name in engines.names():
        assert engines.about(name).able <= ABILITIES.keys(), name
        assert {*engines.about(name).devices} <= DEVICES.keys(), name


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
