"""The table of clients is what ran, and what `headrace connect` knows.

`UPDATE_DOCS=1 scripts/test tests/test_clients_page.py` writes it.
"""

from __future__ import annotations

import os
import re

from tests.conftest import ROOT
from tests.programs import record

from headrace.cli.clients import CLIENTS

PAGE = ROOT / "docs" / "clients.md"
MARKED = re.compile(r"(?<=<!-- clients -->\n).*?(?=<!-- /clients -->)", re.DOTALL)


def test_the_table_is_what_ran() -> None:
    """Issue 14, shown 7: client, version, what works, and how."""
    text = PAGE.read_text(encoding="utf-8")
    expected = MARKED.sub(lambda _: record.table(), text)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected, "UPDATE_DOCS=1 scripts/test tests/test_clients_page.py"
    assert "**not " not in text


def test_every_program_ran() -> None:
    """Issue 14, shown 2: or it is named as one that did not."""
    ran = record.read()
    assert [name for name in CLIENTS if name not in ran and name not in record.NOT_RUN] == []
    assert [name for name in record.PACKAGES if name not in ran] == []
