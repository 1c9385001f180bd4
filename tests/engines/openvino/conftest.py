from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.core.model import ModelFile
from headrace.engines.base import Generator, OpenRequest
from headrace.engines.openvino import convert
from headrace.engines.openvino.engine import Engine
from headrace.models.inspect import inspect

HOME = Path(__file__).resolve().parents[3] / ".cache" / "test-home"


@pytest.fixture(scope="session")
def converted(smollm2_path: Path) -> ModelFile:
    """SmolLM2 as IR; converted once and kept for later runs."""
    return convert(inspect(smollm2_path), HOME)


@pytest.fixture(scope="session")
def engine(converted: ModelFile) -> Iterator[Generator]:
    """The real model in this process, so set that answers repeat themselves where they can."""
    request = OpenRequest(
        model=converted, context_length=2048, max_running=16, options={"precision": "f32"}
    )
    engine: Any = Engine(request)
    yield engine
    engine.close()
