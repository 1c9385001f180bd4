"""The state file."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import ConfigError
from headrace.pool.state import Remembered, StateFile

THINGS = {
    "a": Remembered(changes={"pinned": True, "options": {"threads": 2}}, loaded=True),
    "big": Remembered(reference="hub:org/big:Q4", loaded=False),
}


def kept(path: Path) -> dict[str, Remembered]:
    file = StateFile(path)
    try:
        return file.read()
    finally:
        file.close()


def test_it_is_there_again_after_a_restart(tmp_path: Path) -> None:
    """M8: changes by an operator survive a restart of the service."""
    path = tmp_path / "home" / "services" / "1.json"
    first = StateFile(path)
    assert first.read() == {}
    first.write(THINGS)
    first.close()
    first.close()
    again = StateFile(path)
    assert again.read() == THINGS
    again.write({})
    again.close()
    assert kept(path) == {}


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "services" / "1.json"
    file = StateFile(path)
    file.write(THINGS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(one.name for one in path.parent.iterdir()) == ["1.json", "1.json.lock"]
    file.close()


def test_two_services_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    first = StateFile(path)
    with pytest.raises(ConfigError, match=r"1\.json.*server\.state"):
        StateFile(path)
    other = StateFile(tmp_path / "2.json")
    first.close()
    second = StateFile(path)
    second.close()
    other.close()


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    code = (
        "import sys, os, signal, pathlib\n"
        "from headrace.pool.state import Remembered, StateFile\n"
        "file = StateFile(pathlib.Path(sys.argv[1]))\n"
        "file.write({'a': Remembered(loaded=True)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=30)
    assert kept(path) == {"a": Remembered(loaded=True)}


@pytest.mark.parametrize(
    "content",
    [b"", b'{"models": {"a', b'{"version": 2, "models": {}}', b"[]", b'{"models": "\xff"}'],
)
def test_a_damaged_file_is_kept_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "1.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        file = StateFile(path)
    assert file.read() == {}
    assert "1.json.damaged" in caplog.text
    assert (tmp_path / "1.json.damaged").read_bytes() == content
    file.write(THINGS)
    file.close()
    assert kept(path) == THINGS


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "1.json"
    file = StateFile(path)
    file.write({"a": THINGS["a"]})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        file.write(THINGS)
    assert "No space left" in caplog.text
    assert path.read_bytes() == before
    assert file.read() == THINGS
    monkeypatch.undo()
    file.write(THINGS)
    file.close()
    assert kept(path) == THINGS


def test_without_a_path_it_is_only_in_memory() -> None:
    file = StateFile(None)
    file.write(THINGS)
    assert file.read() == THINGS
    file.close()


def test_a_place_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        file = StateFile(tmp_path / "file" / "services" / "1.json")
    assert "will not be kept" in caplog.text
    file.write(THINGS)
    assert file.read() == THINGS
    file.close()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"adapters.b": False}, {"pinned": True, "adapters.a": "x", "adapters.b": False}),
        ({"adapters.a": "y"}, {"pinned": True, "adapters.a": "y"}),
        ({"adapters": {"c": "z"}}, {"pinned": True, "adapters": {"c": "z"}}),
        ({"adapters": None}, {"pinned": True, "adapters": None}),
    ],
)
def test_changes_of_adapters(changes: dict[str, Any], left: dict[str, Any]) -> None:
    """Issue 17.4: one by one they add up; a whole table replaces them."""
    assert Remembered(changes={"pinned": True, "adapters.a": "x"}).merged(changes) == left
