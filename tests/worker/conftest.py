from __future__ import annotations

import time
from collections.abc import Callable

import pytest


@pytest.fixture
def wait_for() -> Callable[[Callable[[], object], float], None]:
    """Waits until a condition holds, so many seconds at most."""

    def wait(condition: Callable[[], object], within_s: float) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, "it took too long"
            time.sleep(0.02)

    return wait
