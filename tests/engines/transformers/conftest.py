from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests import models_made

from headrace.core.adapter import AdapterFile
from headrace.engines.base import OpenRequest
from headrace.models.inspect import inspect

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine


def opened(
    folder: Path,
    context_length: int = 512,
    adapters: Sequence[AdapterFile] = (),
    **options: Any,
) -> Engine:
    from headrace.engines.transformers.engine import Engine  # torch: only where a test runs

    request = OpenRequest(
        model=inspect(folder),
        device="cpu",
        context_length=context_length,
        options=options,
        adapters=tuple(adapters),
    )
    return Engine(request)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_path: Path) -> Path:
    return models_made.smollm2(smollm2_path)


@pytest.fixture(scope="session")
def tiny_folder(smollm2_path: Path) -> Path:
    return models_made.tiny_llama(smollm2_path)


@pytest.fixture(scope="session")
async def smol(smollm2_folder: Path) -> AsyncIterator[Engine]:
    """The real model in float32. Asynchronous, so that all its tests share one event loop."""
    engine = opened(smollm2_folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["auto", "off"])
async def tiny(request: pytest.FixtureRequest, tiny_folder: Path) -> AsyncIterator[Engine]:
    """A small random model, in batches and one at a time."""
    engine = opened(tiny_folder, batching=request.param, slots=4, step_tokens=32)
    yield engine
    engine.close()
