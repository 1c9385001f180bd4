"""How things are shown."""

from __future__ import annotations

import io
import sys

import pytest

from headrace.cli import terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]52;c;aGk=\x07b\x9bc\td\r\ne"
    screen, pipe = Screen(), io.StringIO()
    for out in (screen, pipe):
        monkeypatch.setattr(sys, "stdout", out)
        terminal.write(text)
    assert screen.getvalue() == "a]52;c;aGk=bc\td\ne"
    assert pipe.getvalue() == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (5 * 10**15, "5000.0 TB"), (None, None)],
)
def test_sizes(count: int | None, text: str | None) -> None:
    assert terminal.size(count) == text


def test_columns_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.columns(("A", "LONG"), [("wide", None), ("x", 12)])
    assert capsys.readouterr().out == "A     LONG\nwide  -\nx     12\n"


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """L: progress bars on long work, on stderr. Issue 12.32: bytes and percent, one stage."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen, pipe = Screen(), io.StringIO()
    for err in (screen, pipe):
        monkeypatch.setattr(sys, "stderr", err)
        with terminal.progress() as report:
            report("asking", 0, 0)
            report("fetching", 500_000, 2_000_000)
            report("loading", 50, 100)
            report("unpacking", 98_000_000, 0)
    assert "500.0 kB of 2.0 MB 25%" in screen.getvalue()
    assert "98.0 MB" in screen.getvalue()
    assert "50%" in screen.getvalue()
    last = screen.getvalue().rpartition("unpacking")[0].rpartition("\x1b[2K")[2]
    assert not any(word in last for word in ("asking", "fetching", "loading"))
    assert "50 B" not in screen.getvalue()
    assert pipe.getvalue() == ""


def test_a_table_wider_than_the_terminal_is_written_as_records(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 16.5: nothing is cut and no line is broken by the terminal; a pipe gets the table."""
    heads = ("NAME", "SIZE", "ERROR", "ABOUT")
    rows = [("日本語", "75 MB", None, "small and quick, for many languages"), ("b", None, "x", "y")]
    monkeypatch.setenv("COLUMNS", "30")
    terminal.columns(heads, rows)
    assert capsys.readouterr().out.splitlines()[0].split() == list(heads)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.columns(heads, rows)
    assert capsys.readouterr().out.splitlines() == [
        "日本語",
        "  SIZE 75 MB",
        "  ABOUT small and quick, for",
        "    many languages",
        "b",
        "  ERROR x  ABOUT y",
    ]
    monkeypatch.setenv("COLUMNS", "80")
    terminal.columns(heads, rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
