from __future__ import annotations

import subprocess
import sys

SEEN = """
import gc
from headrace.core.garbage import collect_less
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


def test_what_is_here_is_left_alone_and_what_comes_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 10_000
