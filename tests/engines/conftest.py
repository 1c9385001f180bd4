from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect


def listening() -> set[int]:
    """The ports on which this process listens."""
    tcp = psutil.Process().net_connections("inet")
    return {one.laddr.port for one in tcp if one.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="session")
def listening_before() -> set[int]:
    """The ports of pytest and its plugins, before an engine has run."""
    return listening()


@pytest.fixture(scope="session")
async def llama(smollm2_path: Path, listening_before: set[int]) -> AsyncIterator[Engine]:
    """The real model in this process. Asynchronous, so that all its tests share one event loop."""
    # One thread: where cores are shared, two wait for one another in every layer.
    options = {"slots": 4, "threads": 1}
    request = OpenRequest(model=inspect(smollm2_path), context_length=2048, options=options)
    engine = Engine(request)
    yield engine
    engine.close()
