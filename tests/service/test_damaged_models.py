"""Files that are not what they say (issue: must show 6)."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.service.serving import served

from headrace.core.errors import LoadFailed
from headrace.models.inspect import inspect

HEADER = 3 << 20
"""Bytes; the header of the real file ends before that."""


def damaged(original: Path, folder: Path, seed: int) -> Path:
    """A sparse copy of the header, cut or with flipped bits."""
    chance = random.Random(seed)
    with original.open("rb") as source:
        head = bytearray(source.read(HEADER))
    size = original.stat().st_size
    if chance.random() < 0.3:
        size = chance.randrange(size)
        head = head[:size]
    else:
        for _ in range(chance.randrange(1, 6)):
            place = chance.choice([chance.randrange(200), chance.randrange(len(head))])
            head[place] ^= 1 << chance.randrange(8)
    copy = folder / f"{seed}.gguf"
    with copy.open("wb") as target:
        target.write(head)
        target.truncate(size)
    return copy


@pytest.mark.parametrize("copies", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_copies(smollm2_path: Path, tmp_path: Path, copies: int) -> None:
    """Refused with a clear error or harmless, and never more than 1 GB for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(copies):
        copy = damaged(smollm2_path, tmp_path, seed)
        try:
            inspect(copy)
        except LoadFailed as error:
            assert copy.name in error.message
            refused += 1
        copy.unlink()
    assert refused > copies * 0.3
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 1 << 20


LOADER = """
import sys, asyncio
from headrace import AsyncModelWorker, HeadraceError
async def main():
    for path in sys.argv[1:]:
        worker = AsyncModelWorker(path, context_length=256, engine="llamacpp", slots=1)
        try:
            await worker.start()
            print("loaded")
        except HeadraceError as error:
            print(type(error).__name__, error)
        finally:
            await worker.aclose()
asyncio.run(main())
"""


def test_copies_that_pass_the_check_kill_only_the_child(smollm2_path: Path, tmp_path: Path) -> None:
    """A bit in the data that no header check sees may break the engine, not its parent."""
    passed = []
    for seed in range(1000, 1040):
        copy = damaged(smollm2_path, tmp_path, seed)
        try:
            inspect(copy)
        except LoadFailed:
            copy.unlink()
        else:
            passed.append(str(copy))
        if len(passed) == 6:
            break
    result = subprocess.run(
        [sys.executable, "-c", LOADER, *passed],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= len(passed)


KINDS = ("directory", "fifo", "unreadable", "empty", "text", "missing")


def no_model(kind: str, path: Path) -> Path:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("not a model")
    elif kind != "missing":
        path.write_bytes(b"GGUF" if kind == "unreadable" else b"")
        path.chmod(0 if kind == "unreadable" else 0o600)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_model_ends_the_start(kind: str, tmp_path: Path) -> None:
    """Issue 11.16: what can be known at the start, by its name, also beside a model that is one."""
    path = no_model(kind, tmp_path / "model.gguf")
    command = [sys.executable, "-m", "headrace", "serve", "builtin:echo", str(path), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode not in {0, -signal.SIGKILL}
    assert str(path) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_not_a_model_is_refused_by_the_service(tmp_path: Path) -> None:
    """W5: a clear error, the API process lives and serves its other models."""
    with served("builtin:echo") as service:
        for kind in KINDS:
            path = no_model(kind, tmp_path / f"{kind}.gguf")
            answer = httpx.post(
                f"{service.url}/admin/models/load", json={"model": str(path)}, timeout=30
            )
            assert answer.status_code in {400, 404, 503}, answer.text
            assert str(path) in answer.json()["error"]["message"]
            assert service.process.poll() is None
            other = httpx.post(
                f"{service.url}/v1/completions", json={"model": "echo", "prompt": "a"}, timeout=30
            )
            assert other.json()["choices"][0]["text"] == "a"
        # M2: one that fails leaves the others serving.
        service.wait_until_ready()
