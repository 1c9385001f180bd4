from __future__ import annotations

import subprocess
import sys

COLLECTED = """
import gc
from headrace.machine import tune_garbage_collection
loop = []
loop.append(loop)
tune_garbage_collection()
assert gc.get_freeze_count() > 1000
assert gc.collect() == 0
loop = []
loop.append(loop)
del loop
assert gc.collect() == 1
print(gc.get_threshold()[0])
"""

HELD_UP = """
import statistics, threading, time
from headrace.machine import shorten_switch_interval
over = False
def busy():
    while not over:
        pass
def held_up():
    waits = []
    for _ in range(100):
        began = time.perf_counter()
        time.sleep(0.001)
        waits.append(time.perf_counter() - began)
    return statistics.median(waits)
thread = threading.Thread(target=busy)
thread.start()
usual = held_up()
shorten_switch_interval()
sooner = held_up()
over = True
print(sooner / usual)
"""


def _output(program: str) -> float:
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_is_here_is_not_collected_and_what_comes_is() -> None:
    assert _output(COLLECTED) >= 10_000


def test_a_busy_thread_gives_way() -> None:
    """After half a millisecond, where CPython's default is five: of 6 ms about 2 are left."""
    assert _output(HELD_UP) < 0.7
