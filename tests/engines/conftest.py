from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp import Engine
from headrace.models.inspect import inspect


@pytest.fixture(scope="session")
async def llama(smollm2_path: Path) -> AsyncIterator[Engine]:
    """The real model in this process. Asynchronous, so that all its tests share one event loop."""
    engine = Engine(
        OpenRequest(model=inspect(smollm2_path), context_length=2048, options={"slots": 4})
    )
    yield engine
    engine.close()
