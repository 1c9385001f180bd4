"""`headrace ls` and `rm`, on a store of its own that links to the model of the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.programs import headrace

READER = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=1); "


@pytest.fixture
def file(environ: dict[str, str], smollm2_path: Path) -> Path:
    """The model's file in a store that this test may delete."""
    home = Path(environ["HOME"]) / "h"
    environ["HEADRACE_HOME"] = str(home)
    store = smollm2_path.parents[2]
    shutil.copytree(store / "records", home / "models" / "records")
    copy = home / "models" / "files" / smollm2_path.parent.name / smollm2_path.name
    copy.parent.mkdir(parents=True)
    copy.hardlink_to(smollm2_path)
    return copy


def test_rm_asks_or_is_told(environ: dict[str, str], file: Path) -> None:
    """Issue 12.26: without a terminal nothing is deleted that was not confirmed by a flag."""
    for stdin in ("n\n", "y\n", ""):
        done = headrace(environ, "rm", "smollm2", stdin=stdin)
        assert (done.returncode, "--yes" in done.stderr, file.exists()) == (2, True, True)
    done = headrace(environ, "rm", "smollm2", "--yes")
    assert (done.returncode, file.exists()) == (0, False), done.stderr
    assert "98.4 MB are free again" in done.stdout


@pytest.mark.parametrize("closes", [False, True])
def test_rm_spares_what_a_process_has_loaded(
    environ: dict[str, str], file: Path, closes: bool
) -> None:
    """Issue 12.26: a service on any port, a run or a program of one's own."""
    code = READER + ("f.close(); " if closes else "") + "print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        done = headrace(environ, "rm", "smollm2", "--yes")
        process.communicate()
    assert (done.returncode, file.exists()) == (2, True)
    assert f"smollm2 is loaded by process {process.pid}" in done.stderr


def test_converted_copies_are_listed_and_go_with_their_model(
    environ: dict[str, str], file: Path
) -> None:
    """Issue 12.17: also those of an earlier file, and none is left behind."""
    copies = file.parents[3] / "converted"
    for number in range(2):
        copy = copies / f"smollm2-{number}"
        copy.mkdir(parents=True)
        (copy / "source.txt").write_text(str(file))
        (copy / "weights.bin").write_bytes(bytes(1000))
    other = copies / "other-0"
    other.mkdir()
    (other / "source.txt").write_text(__file__)
    listed = json.loads(headrace(environ, "ls", "--json").stdout)
    assert [model["converted"] for model in listed] == [2 * (1000 + len(str(file)))]
    text = headrace(environ, "ls").stdout
    assert "2.3 kB" in text or "2.2 kB" in text
    assert __file__ in text
    done = headrace(environ, "rm", "-y", "smollm2", "--json")
    assert json.loads(done.stdout)["freed"] == 98_362_432 + listed[0]["converted"]
    assert [copy.name for copy in copies.iterdir()] == ["other-0"]
