"""The examples in the README and the docs run, and the links and files that they name exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import MODEL_HOME, ROOT
from tests.pictures_made import png
from tests.service.serving import Service, served
from tests.sounds_made import wav

from headrace.api.app import ADMIN_ROUTES, ROUTES
from headrace.api.batch.routes import BatchRoutes

PAGES = ("README.md", "docs/getting-started.md", "docs/coming-from.md", "docs/structured-output.md")
PAGES += ("docs/batches.md",)
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"HEADRACE_HOME": str(MODEL_HOME), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_of_a_page_runs(block: str, smollm2_path: Path) -> None:
    """W9, W10: the snippets of the issue and the docs do what they say."""
    if "11511" not in block:
        assert run(block).strip()
        return
    with served("smollm2", "--context-length", "512") as service:
        assert run(block.replace("http://127.0.0.1:11511", service.url)).strip()


# What the pages call so; the commands are tested, and not what a model answers.
STAND_INS = """
[models.smollm2]
model = "echo"
[models.all-minilm-l6-v2]
model = "echo"
task = "embed"
prompts = { query = "", document = "" }
[models.reranker]
model = "echo"
task = "rerank"
[models.smolvlm]
model = "echo"
options = { images = true }
[models.ultravox]
model = "echo"
options = { audio = true }
"""
SHELL_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"] + [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))
]
BLOCK = re.compile(
    r"^(?P<why><!-- not run: .+ -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
# A picture of `top` begins with its name, two spaces and the address.
COMMAND = re.compile(
    r"^(?!headrace top  )(\$ )?(headrace|curl|pip|export|scripts/\w+|python3?|[A-Z_]+=\S+) ",
    re.MULTILINE,
)


def shell_blocks() -> Iterator[tuple[str, str]]:
    """Yield the page and the commands of each block that is to be run."""
    for page in SHELL_PAGES:
        for match in BLOCK.finditer((ROOT / page).read_text()):
            code = match["code"]
            if match["kind"] == "console":
                code = "".join(f"{line[2:]}\n" for line in code.splitlines() if line[:2] == "$ ")
            if match["kind"] in ("sh", "console") and not match["why"]:
                yield page, code


@pytest.fixture(scope="module")
def shell(
    tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path
) -> Iterator[tuple[Path, Service]]:
    """A folder with the files that the pages name, and a service with their models."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "notes.txt").write_text("Rivers run to the sea.")
    (folder / "photo.png").write_bytes(png())
    (folder / "question.wav").write_bytes(wav(0.5))
    (folder / "models").mkdir()
    (folder / "models" / "mine.gguf").symlink_to(smollm2_path)
    (folder / "headrace.toml").write_text(STAND_INS)
    with served(environment=_variables(folder)) as service:
        yield folder, service


def _variables(folder: Path) -> dict[str, str]:
    home, file = str(folder / "home"), str(folder / "headrace.toml")
    return {"CONFIG": file, "HOME": home, "CONTEXT_LENGTH": "256"}


@pytest.mark.parametrize(
    ("page", "code"),
    [pytest.param(*block, id=f"{block[0]}-{n}") for n, block in enumerate(shell_blocks())],
)
def test_the_commands_of_a_page_run(
    page: str, code: str, shell: tuple[Path, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12.33: as they are written, but for the port and the model behind the name."""
    folder, service = shell
    monkeypatch.chdir(folder)
    commands: list[str] = []
    for line in code.splitlines(keepends=True):
        if not line.startswith("headrace serve"):
            commands.append(line)
            continue
        arguments = re.sub(r"--port \d+", "", line.partition("#")[0])
        with served(*shlex.split(arguments)[2:], environment=_variables(folder)):
            pass
    script = "".join(commands).replace("http://127.0.0.1:11511", service.url)
    variables = {f"HEADRACE_{name}": value for name, value in _variables(folder).items()}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("curl ", "curl -sS --fail-with-body ")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables, "PATH": path, "HEADRACE_URL": service.url},
    )
    assert done.returncode == 0, f"{page}: {done.stdout}{done.stderr}"
    assert not script.strip() or done.stdout


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_every_command_of_a_page_is_run_or_says_why_not(page: str) -> None:
    """Issue 12.33: a block of commands is marked as one."""
    for match in BLOCK.finditer((ROOT / page).read_text()):
        if match["kind"] not in ("sh", "console", "python", "toml") and not match["why"]:
            assert not COMMAND.search(match["code"]), match[0]


def test_the_first_screen_of_the_readme() -> None:
    """Issue 12.34: what, how, for whom, against whom, a picture, and what is sent to others."""
    page = (ROOT / "README.md").read_text()
    screen = page.partition("\n## ")[0]
    parts = (
        "headrace run smollm2",
        "**Who it is for.**",
        "| | Headrace | [Ollama]",
        "[llama-swap]",
        "[vLLM]",
        "**no; no**",
        "headrace top  http",
        "**Headrace sends nothing to anyone.**",
    )
    assert [part for part in parts if part not in screen] == []
    assert [screen.index(part) for part in parts[:4]] == sorted(map(screen.index, parts[:4]))
    assert len(screen.splitlines()) < 70
    assert "](docs/benchmarks.md)" in page


def test_every_route_is_in_getting_started() -> None:
    """Issue 12.33: those of other servers' APIs too."""
    pages = [ROOT / "docs" / f"{name}.md" for name in ("getting-started", "ollama")]
    page = "".join(page.read_text() for page in pages)
    for route in (*ROUTES, *ADMIN_ROUTES, *BatchRoutes(None).routes()):
        path = route.path.partition("{")[0].rstrip("/")
        assert path in page or path.startswith("/admin/"), path


def test_each_page_has_its_place_in_the_site() -> None:
    """Issue 16.4: a new page is a line of `nav` in website/mkdocs.yml."""
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "website" / "mkdocs.yml").read_text(), re.M))
    docs = ROOT / "docs"
    assert {str(path.relative_to(docs)) for path in docs.rglob("*.md")} - named == set()


def test_the_readme_links_to_each_page() -> None:
    """Pages of engines are in its table; those on other servers are behind "coming from"."""
    named = set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages - named if not page.startswith("coming-from-")} == set()


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    """A path may leave out `src/headrace/` and, in a table of one folder, that folder."""
    folders = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks"]
    files = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")}
    names = re.findall(r"`([a-z_/]+\.py)`", (ROOT / page).read_text())
    assert len(names) > 10
    assert [
        name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ] == []
