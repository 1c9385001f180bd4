"""Takes the pictures of the documentation from a running service: scripts/pictures.

The console in Chromium, `headrace top` and `run` as they are on a terminal, and the plot of
`headrace bench`, all with a real model.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.text import Text
from tests.browser.driver import Browser, browser
from tests.conftest import MODEL_HOME, ROOT
from tests.service.serving import Service, served

from headrace.cli import top_frame

PICTURES = ROOT / "docs" / "pictures"
MODELS = """
[models.smollm2]
model = "smollm2"
context_length = 4096
[models.echo]
model = "echo"
options = { tokens_per_second = 20 }
[models.spare]
model = "echo"
preload = false
[telemetry]
trace_content = true
"""
STORY = [{"role": "user", "content": "Write a long story about a river and a mill."}]
QUESTION = "What is a river? Answer in one sentence."
WIDTH = 92
ADDRESS = "http://127.0.0.1:11511"


def main() -> None:
    """Take all pictures; each is written when it is complete."""
    PICTURES.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pictures-"))
    home = folder / "home"
    shutil.copytree(MODEL_HOME / "models", home / "models", symlinks=True)
    (folder / "headrace.toml").write_text(MODELS)
    environment = {"CONFIG": str(folder / "headrace.toml"), "HOME": str(home)}
    try:
        bench(environment)
        with served(environment=environment) as service, browser(folder / "profile") as page:
            session(service, ["headrace", "run", "smollm2", QUESTION])
            ask(service)
            with busy(service):
                page.size(1280, 880)
                console(page, service)
                terminal(service)
            playground(page, service)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bench(environment: dict[str, str]) -> None:
    """Let `headrace bench` measure, keep the run for the console, and draw its plot."""
    command = [sys.executable, "-m", "headrace", "bench", "echo", "--concurrency", "1,2,4,8"]
    command += ["--requests", "16", "--plot", str(PICTURES / "bench.png")]
    variables = {f"HEADRACE_{key}": value for key, value in environment.items()}
    subprocess.run(command, env=os.environ | variables, check=True)


def ask(service: Service) -> None:
    """Send some requests, so that the pages have something to show."""
    for text in ("Name a river.", "What is a mill race?", "Hello"):
        body = {"model": "smollm2", "messages": [{"role": "user", "content": text}]}
        body["max_tokens"] = 40
        httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=120)


@contextmanager
def busy(service: Service) -> Iterator[None]:
    """Keep streams running meanwhile."""
    stop = threading.Event()

    def stream(model: str) -> None:
        body = {"model": model, "messages": STORY, "stream": True, "max_tokens": 1500}
        while not stop.is_set():
            with (
                suppress(httpx.HTTPError),
                httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body) as answer,
            ):
                for _ in answer.iter_raw():
                    if stop.is_set():
                        break

    threads = [threading.Thread(target=stream, args=(m,)) for m in ("smollm2",) * 2 + ("echo",) * 2]
    for thread in threads:
        thread.start()
    try:
        wait_for_tokens(service)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for_tokens(service: Service) -> None:
    """Wait until the rates of a minute have a figure of the real model."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        rates = httpx.get(f"{service.url}/admin/activity").json()["rates"]
        if sum(rate["completion_tokens_per_second"] > 1 for rate in rates) > 1:
            return
        time.sleep(0.2)
    raise AssertionError("no tokens have come")


def terminal(service: Service) -> None:
    """Draw `headrace top` in its colours."""
    command = [sys.executable, "-m", "headrace", "top", "--once", "--json", "--url", service.url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    snapshot = msgspec.json.decode(output, type=top_frame.Snapshot)
    samples = httpx.get(f"{service.url}/admin/history").json()["samples"]
    history = [sample["completion_tokens_per_second"] for sample in samples]
    console = Console(record=True, width=WIDTH, file=Path(os.devnull).open("w"))  # noqa: SIM115
    for line in top_frame.lines(snapshot, service.url, WIDTH, history=history):
        console.print(Text.assemble(*line))
    picture = console.export_svg(title="headrace top")
    # The fonts of the machine will do: nothing is loaded from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    (PICTURES / "top.svg").write_text(picture.replace(service.url, ADDRESS), encoding="utf-8")


def console(page: Browser, service: Service) -> None:
    """Show the pages of the console while the service is busy."""
    page.open(f"{service.url}/#/now")
    page.find(".plot canvas")
    page.wait("document.querySelectorAll('table.models tbody tr').length > 1")
    # The charts grow by a sample with each answer.
    asked = "performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/overview'))"
    page.wait(f"{asked}.length > 6")
    page.picture(PICTURES / "console-now.png")
    for name, css in (("speed", ".xy polyline"), ("models", ".library .buttons")):
        page.open(f"{service.url}/#/{name}")
        page.find(css)
        page.js("document.querySelector('.library')?.closest('section').scrollIntoView()")
        page.picture(PICTURES / f"console-{name}.png")
    page.open(f"{service.url}/#/requests")
    page.find(".grid tbody th a")
    page.choose(".filters select", "smollm2")
    page.wait("!document.querySelector('.grid tbody').innerText.includes('echo')")
    page.click(".grid tbody th a")
    page.see("Steps")
    page.picture(PICTURES / "console-request.png")


def playground(page: Browser, service: Service) -> None:
    """Ask the real model in the playground."""
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "smollm2")
    page.type(".composer textarea", "Write a Python function that reverses a string.\ue007")
    page.wait("document.querySelector('.answer .figures') !== null", within_s=180)
    page.picture(PICTURES / "console-playground.png")


def session(service: Service, words: list[str]) -> None:
    """Run a command on a terminal, and draw what came as an animation of its real pace."""
    pieces = recorded([sys.executable, "-m", *words, "--url", service.url, "--temperature", "0"])
    pieces = [(at, text.replace(service.url, ADDRESS)) for at, text in pieces]
    text = animated(" ".join(words[:-1]) + f' "{words[-1]}"', pieces)
    (PICTURES / "session.svg").write_text(text, encoding="utf-8")


def recorded(command: list[str]) -> list[tuple[float, str]]:
    """Return what a command writes to a terminal, each piece with its time in seconds."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": str(WIDTH)})
        os.execv(command[0], command)
    began, pieces = time.monotonic(), list[tuple[float, str]]()
    with suppress(OSError):  # a terminal whose program has ended
        while data := os.read(terminal, 4096):
            pieces.append((time.monotonic() - began, data.decode(errors="replace")))
    os.waitpid(pid, 0)
    os.close(terminal)
    return pieces


ADVANCE, LINE, LEFT, ABOVE = 8.4, 20, 18, 58
TYPED_S = 1.2
LONGEST_S = 0.12
"""Of a pause between two pieces: a busy machine would make the picture slow, too."""


def animated(command: str, pieces: list[tuple[float, str]]) -> str:
    """Return an SVG in which each piece appears at its time."""
    first = pieces[0][0] if pieces else 0.0
    parts = [(0.3 + TYPED_S * n / len(command), letter) for n, letter in enumerate(command)]
    parts += [(TYPED_S + 0.6, "\n")]
    written, at = "", TYPED_S + 0.8
    for (before, _), (now, text) in zip([(first, ""), *pieces], pieces, strict=False):
        at += min(now - before, LONGEST_S)
        text = text.replace("\r", "")
        parts.append((at, text if written else text.lstrip("\n")))
        written += text.strip()
    row, column, drawn = 0, 2, [_piece(0, 0, 0, "$ ", "prompt")]
    for at, text in _wrapped(parts):
        for index, line in enumerate(text.split("\n")):
            if index:
                row, column = row + 1, 0
            drawn.append(_piece(row, column, at, line))
            column += len(line)
    width, height = round(2 * LEFT + WIDTH * ADVANCE), ABOVE + (row + 1) * LINE
    return _FRAME.format(width=width, height=height, body="\n".join(filter(None, drawn)))


def _wrapped(parts: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Break the lines at words: the last space that fits becomes the end of the line."""
    letters = [letter for _, text in parts for letter in text]
    column, space = 2, 0  # after the prompt
    for place, letter in enumerate(letters):
        column = 0 if letter == "\n" else column + 1
        space = place if letter == " " else space
        if column > WIDTH:
            letters[space], column = "\n", place - space
    rest = iter(letters)
    return [(at, "".join(next(rest) for _ in text)) for at, text in parts]


def _piece(row: int, column: int, at: float, text: str, kind: str = "") -> str:
    if not text.strip():
        return ""
    x, y = LEFT + column * ADVANCE, ABOVE + row * LINE
    name = f' class="{kind}"' if kind else ""
    length = f'textLength="{len(text) * ADVANCE:.1f}"'
    delay = f' style="animation-delay:{at:.2f}s"'
    return f'<text x="{x:.1f}" y="{y}" {length}{name}{delay}>{escape(text)}</text>'


_FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>A session of headrace on a terminal</title>
<style>
rect {{ fill: #12181c; }}
text {{ fill: #dfe6ea; font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; opacity: 0; animation: show 1ms linear forwards; }}
.prompt {{ fill: #3bb9d0; }}
circle {{ fill: #3a454c; }}
@keyframes show {{ to {{ opacity: 1; }} }}
@media (prefers-reduced-motion: reduce) {{ text {{ opacity: 1; animation: none; }} }}
</style>
<rect width="{width}" height="{height}" rx="8"/>
<circle cx="22" cy="20" r="6"/><circle cx="42" cy="20" r="6"/><circle cx="62" cy="20" r="6"/>
{body}
</svg>
"""


if __name__ == "__main__":
    main()
