"""Pages of the site that are not in `docs`, and links between what is there and what is not.

The pages are written for readers of the repository: a link may leave `docs`. What it names becomes
a part of the site too, so that no link needs a host for the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = PurePosixPath("docs")
PAGES = {
    "index.md": "README.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Pages of the repository's root, by their names in the site."""
ASSETS = {"assets/icon.svg": "src/headrace/console/icon.svg", "assets/site.css": "website/site.css"}
OTHERS = "repository"
"""The folder of the site with the other files that are linked."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|<)([^)#\s]+)(#[^)\s]*)?(?=\))")
PUBLIC = (
    *("ModelWorker", "AsyncModelWorker", "ModelSpec", "ModelInfo", "Message", "Sampling", "Tool"),
    *("Constraint", "Delta", "Finish", "GenerateResult", "InferenceMetrics", "Usage"),
    "HeadraceError",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs`, and what they and those of `docs` link to."""
    sources = {path: (ROOT / name) for path, name in PAGES.items()}
    for path, source in sources.items():
        files.append(File.generated(config, path, content=source.read_text(encoding="utf-8")))
    files.append(File.generated(config, "python.md", content=_python()))
    for path, name in ASSETS.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / name)))
    texts = [(page.src_uri, page.content_string) for page in files.documentation_pages()]
    for name in sorted({name for uri, text in texts for name in _outside(uri, text)}):
        path = f"{OTHERS}/{name}"
        files.append(File.generated(config, path, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to where the site has what they name."""
    del config, files
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _target(uri, match[1])
        here = os.path.relpath(_site_path(target), PurePosixPath(uri).parent)
        return quote(here) + (match[2] or "")

    return LINK.sub(moved, markdown)


def _source(uri: str) -> PurePosixPath:
    """Return where a page of the site is in the repository."""
    return PurePosixPath(PAGES[uri]) if uri in PAGES else DOCS / uri


def _target(uri: str, link: str) -> PurePosixPath:
    """Return what a link of a page names, below the root of the repository."""
    return PurePosixPath(os.path.normpath(_source(uri).parent / link))


def _site_path(target: PurePosixPath) -> str:
    """Return where the site has a file of the repository."""
    if target.is_relative_to(DOCS):
        return str(target.relative_to(DOCS))
    pages = {source: uri for uri, source in PAGES.items()}
    return pages.get(str(target), f"{OTHERS}/{target}")


def _outside(uri: str, text: str) -> set[str]:
    """Return the files of the repository, not pages of the site, that a page links to."""
    targets = {_target(uri, match[1]) for match in LINK.finditer(text)}
    return {
        str(target)
        for target in targets
        if _site_path(target).startswith(OTHERS) and (ROOT / target).is_file()
    }


def _python() -> str:
    """Return the page of the library for Python: its public names, by mkdocstrings."""
    parts = "\n".join(f"::: headrace.{name}\n" for name in PUBLIC)
    about = "`import headrace`. [Getting started](getting-started.md) has examples."
    return f"# Python\n\n{about}\n\n{parts}"
