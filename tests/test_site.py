"""The documentation as a site: it builds without a broken link, and loads nothing from outside."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.conftest import ROOT

pytestmark = [pytest.mark.site, pytest.mark.timeout(600)]
SHELVES = ("Learn", "Do", "Understand", "Look up")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Issue 16.4: a strict build, in which a link or an anchor that is not there is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [ROOT / "scripts" / "docs", folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a page loads: scripts, styles, pictures, icons."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.addresses.append(names.get("src") or "")
        elif tag == "link" and names.get("rel") in {"stylesheet", "icon", "preload", "preconnect"}:
            self.addresses.append(names.get("href") or "")


def loads(site: Path) -> Iterator[tuple[str, str]]:
    for page in site.rglob("*.html"):
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        yield from ((page.name, address) for address in parser.addresses)


def test_four_shelves_with_all_pages(site: Path) -> None:
    """Issue 16.4: learn, do, understand, look up; each page of the repository is in one of them."""
    text = (site / "index.html").read_text(encoding="utf-8")
    tabs = re.findall(r'class="md-tabs__link">\s*([^<]+?)\s*<', text)
    assert tuple(tabs) == SHELVES
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_the_search_finds_pages_and_names_of_the_library(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"] for entry in index["docs"]}
    assert {"library.html", "comparison.html", "SECURITY.html"} <= places
    assert "python.html#headrace.ModelWorker.generate" in places


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    """Issue 16.4: the site is read without a network."""
    loaded = [*loads(site)]
    assert len(loaded) > 100
    assert [pair for pair in loaded if re.match(r"\w+:|//", pair[1])] == []
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\([\"']?(?:https?:|//)", text)
