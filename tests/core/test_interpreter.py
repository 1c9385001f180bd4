from __future__ import annotations

import subprocess
import sys

COLLECTED = """
import gc
from headrace.core.interpreter import collect_less
loop = []
loop.append(loop)
collect_less()
assert gc.get_freeze_count() > 1000
assert gc.collect() == 0
loop = []
loop.append(loop)
del loop
assert gc.collect() == 1
print(gc.get_threshold()[0])
"""

HELD_UP = """
import threading, time
from headrace.core.interpreter import give_way_sooner
give_way_sooner()
over, waits = False, []
def busy():
    while not over:
        pass
thread = threading.Thread(target=busy)
thread.start()
for _ in range(200):
    began = time.perf_counter()
    time.sleep(0)
    waits.append(time.perf_counter() - began)
over = True
print(sorted(waits)[100] * 1000)
"""


def _told(program: str) -> float:
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_is_here_is_not_collected_and_what_comes_is() -> None:
    assert _told(COLLECTED) >= 10_000


def test_a_busy_thread_gives_way() -> None:
    """After half a millisecond, where CPython's default is five."""
    assert 0.1 < _told(HELD_UP) < 3
