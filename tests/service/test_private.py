"""What is kept belongs to the user alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.service.serving import served

from headrace.core.private import close_to_others, make_private, private_folder


@pytest.fixture(params=[0o000, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def open_to_others(home: Path) -> dict[str, str]:
    """Return the mode of whatever others may touch."""
    places = (home, *home.rglob("*"))
    modes = {str(path): stat.S_IMODE(path.lstat().st_mode) for path in places}
    wanted = {str(path): 0o700 if path.is_dir() else 0o600 for path in places}
    return {path: oct(mode) for path, mode in modes.items() if mode != wanted[path]}


def test_all_that_a_service_keeps_is_private(
    umask: int, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Issue 11.13: measurements, locks, records, usage and state, whatever the umask."""
    home = tmp_path / "data" / "home"
    if umask:
        home.mkdir(parents=True)  # as an earlier version has made it
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    with served("builtin:echo", environment={"HOME": str(home)}, port=free_port()) as service:
        answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=20)
        assert answer.status_code == 200
        for change in ("unload", "load"):
            reply = httpx.post(f"{service.url}/admin/models/{change}", json={"model": "echo"})
            assert reply.status_code == 200
        service.process.terminate()
        service.process.wait(20)
    names = {path.name for path in home.rglob("*")}
    assert names >= {"measured.json", ".measured.json.lock", "traces", "usage.sqlite3", "services"}
    assert open_to_others(home if umask else tmp_path / "data") == {}


@pytest.mark.usefixtures("umask")
def test_folders_are_made_private_and_those_above_are_left(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    (tmp_path / "a" / "b").chmod(0o755)
    private_folder(tmp_path / "a" / "b")
    mode = stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode)
    assert mode == 0o755, "it may be the folder of a file that the user has named"
    make_private(tmp_path / "a")
    assert open_to_others(tmp_path / "a") == {}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "file")


def test_a_home_of_an_earlier_version_is_closed(tmp_path: Path) -> None:
    """Issue 11.13: but a folder for all users is left."""
    home, shared = tmp_path / "home", tmp_path / "shared"
    for folder, mode in ((home, 0o755), (shared, 0o1777)):
        folder.mkdir()
        folder.chmod(mode)
        close_to_others(folder)
    close_to_others(tmp_path / "nowhere")
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (home, shared)]
    assert modes == [0o700, 0o1777]
