"""`headrace run` with one prompt on a terminal: Markdown, wrapped; elsewhere the text itself."""

from __future__ import annotations

import contextlib
import os
import pty
import re

from tests.cli.programs import PROGRAM

MARKDOWN = (
    "# Rivers\n\nThe **Danube** is long, and so is this line, which has to be wrapped at words."
    "\n\n<b>html</b> is text\n<script>too</script>\n\n- <i>here</i>\n\n```html\n<p>code</p>\n```"
)


def answered_on_terminal(environ: dict[str, str], term: str = "xterm") -> str:
    """Run one answer on a terminal of 40 columns, and return all that was written to it."""
    more = {"TERM": term, "COLUMNS": "40", "LINES": "20"}
    child, terminal = pty.fork()
    if child == 0:
        words = [*PROGRAM, "run", "echo", MARKDOWN, "--no-figures"]
        os.execve(PROGRAM[0], words, environ | more)
    written = b""
    with contextlib.suppress(OSError):  # the terminal of a program that has ended
        while piece := os.read(terminal, 4096):
            written += piece
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return written.decode()


def test_one_answer_is_formatted_on_a_terminal_only(environ: dict[str, str]) -> None:
    """Issue 16.5: Markdown and word wrap where someone looks, the text itself anywhere else."""
    shown = answered_on_terminal(environ)
    assert "**" not in shown
    assert "\x1b[1m" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", plain)) <= 40
    for text in ("<b>html</b> is text", "<script>too</script>", "<i>here</i>", "<p>code</p>"):
        assert text in plain
    assert "\\<" not in plain
    assert MARKDOWN.splitlines()[2] in answered_on_terminal(environ, "dumb")
