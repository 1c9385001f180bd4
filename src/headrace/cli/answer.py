"""An answer on the screen while it is generated: plain, or formatted for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from headrace import log
from headrace.cli import terminal

Shown = Callable[[], AbstractContextManager[terminal.Write]]
"""Yields a function that shows the next piece of an answer."""

_FENCES = ("```", "~~~")


def for_chat() -> Shown:
    """Return how answers of a chat are shown: formatted if stdout is a terminal that can."""
    able = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    return formatted if able else terminal.plain


@contextmanager
def formatted(console: Console | None = None) -> Generator[terminal.Write]:
    """Yield a function that shows Markdown, wrapped at words; a spinner until the first text."""
    console = console or Console(no_color=not log.colourful(), highlight=False)
    blocks = _Blocks(console)
    with Live(blocks, console=console, transient=True, refresh_per_second=12):
        try:
            yield blocks.write
        finally:
            blocks.end()


class _Blocks:
    """The text of an answer: complete blocks are printed once, the last one is drawn again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text: str | None = None
        self._thought = ""
        self._printed = False
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._text is None:
            yield self._spinner
            return
        # A block that is higher than the screen is shown from its end.
        lines = console.render_lines(_markdown(self._text), options.update(height=None))
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()

    def write(self, text: str, *, thinking: bool = False) -> None:
        """Add text. Thinking is printed as it comes, dimmed, by lines."""
        if thinking:
            self._think(terminal.printable(text))
            return
        self._think("\n" if self._thought else "")
        self._text = (self._text or "") + terminal.printable(text)
        end = complete(self._text)
        block, self._text = self._text[:end], self._text[end:]
        self._print(block)

    def end(self) -> None:
        """Print what is left."""
        self._think("\n" if self._thought else "")
        block, self._text = self._text or "", ""
        self._print(block)

    def _think(self, text: str) -> None:
        *lines, self._thought = (self._thought + text).split("\n")
        for line in lines:
            self._console.print(Text(line), style="dim")
            self._printed = True

    def _print(self, block: str) -> None:
        if block.strip():
            if self._printed:
                self._console.print()
            self._console.print(_markdown(block))
            self._printed = True


def complete(text: str) -> int:
    """Return the length of the blocks of Markdown that further text cannot change.

    A block ends at an empty line before one that is not indented, outside of fenced code.
    """
    fence, is_blank, position, end = "", False, 0, 0
    for line in text.split("\n"):
        if not fence and is_blank and line[:1].strip():
            end = position
        mark = line.strip()[:3]
        if mark in _FENCES and fence in ("", mark):
            fence = "" if fence else mark
        is_blank = not line.strip()
        position += len(line) + 1
    return end


def _markdown(text: str) -> Markdown:
    """Return a block to be drawn; its line breaks stay, and no link is hidden behind text."""
    drawn = Markdown("  \n".join(text.strip("\n").split("\n")), hyperlinks=False)
    for token in drawn.parsed:
        # HTML is text of the answer, and would be left out.
        if token.type == "html_block":
            token.type = "fence"
        for child in token.children or ():
            if child.type == "html_inline":
                child.type = "text"
    return drawn
