"""One service for the clients of others: the echo engine, which calls at will, and a real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.service.serving import served


@pytest.fixture(scope="session")
def url(smollm2_path: Path) -> Iterator[str]:
    with served("smollm2", "builtin:echo", "--context-length", "2048") as service:
        yield f"{service.url}/v1"
