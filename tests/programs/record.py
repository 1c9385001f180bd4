"""What ran: a client, its version, and what was tried with it, kept in docs/clients.json."""

from __future__ import annotations

import json
from typing import Any

from tests.conftest import ROOT

FILE = ROOT / "docs" / "clients.json"


def read() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def note(client: str, version: str, works: dict[str, bool]) -> None:
    """Add to the record of a client; another version begins a new one."""
    entries = read()
    entry = entries.get(client, {})
    before = entry.get("works", {}) if entry.get("version") == version else {}
    entries[client] = {"version": version, "works": {**before, **works}}
    text = json.dumps(dict(sorted(entries.items())), indent=2) + "\n"
    FILE.write_text(text, encoding="utf-8")
