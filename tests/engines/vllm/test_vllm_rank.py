"""Ranks of vLLM, without vLLM: they end with their core, and the cause is known."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.engines.vllm import core

CORE = """
import multiprocessing, os, sys, time
from headrace.engines.vllm.core import RANK_REPORT
def rank():
    from headrace.engines.vllm.rank import Rank
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    os.environ[RANK_REPORT] = sys.argv[1]
    multiprocessing.set_start_method("spawn")
    multiprocessing.Process(target=rank).start()
    time.sleep(600)
"""


def test_a_rank_ends_with_its_core(tmp_path: Path) -> None:
    """Issue 11.15: a rank that computes does not notice that the other end of its pipe is gone."""
    program = tmp_path / "core.py"
    program.write_text(CORE)
    command = [sys.executable, str(program), str(tmp_path / "report")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rank = psutil.Process(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs([rank], 10)
    assert alive == []


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Path]:
    """Where this process reports, as the core of an engine does."""
    path, log = tmp_path / "failed", logging.getLogger("vllm")
    before = [*log.handlers]
    yield path
    log.handlers[:] = before


LOST = "Worker proc VLLM::Worker_TP1 died unexpectedly, shutting down executor."


def test_the_end_of_a_rank_is_the_cause(report: Path) -> None:
    """Issue 11.20: what the core raises afterwards is only that something has failed."""
    log = logging.getLogger("vllm")
    log.addHandler(core._Report(report))
    assert core.reported(report) == ""
    log.error("see above", exc_info=RuntimeError("early"))
    assert core.reported(report) == "RuntimeError: early"
    log.error(LOST)
    log.error("see above", exc_info=RuntimeError("cancelled"))
    assert core.reported(report) == LOST


def test_the_first_exception_of_a_rank_is_the_cause(report: Path) -> None:
    """Issue 11.20: before the message that it has died, and what other ranks make of it."""
    log = logging.getLogger("vllm")
    log.addHandler(core._Report(report))
    log.addHandler(core._Report(core._rank_report(report), first=True))
    log.error("in a rank", exc_info=MemoryError("CUDA out of memory"))
    log.error("in the next", exc_info=RuntimeError("cancelled"))
    log.error(LOST)
    assert core.reported(report) == "MemoryError: CUDA out of memory"
