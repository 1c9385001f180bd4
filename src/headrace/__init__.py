"""Headrace runs language models on the engine that suits the machine, behind one API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.core.constraint import Constraint
    from headrace.core.errors import HeadraceError
    from headrace.core.events import (
        Delta,
        EmbedResult,
        Event,
        Finish,
        GenerateResult,
        Progress,
        RerankResult,
    )
    from headrace.core.metrics import InferenceMetrics, Usage
    from headrace.core.model import ModelInfo, ModelSpec
    from headrace.core.request import EmbedRequest, GenerateRequest, Message, RerankRequest
    from headrace.core.sampling import Sampling
    from headrace.model_worker import AsyncModelWorker
    from headrace.sync import ModelWorker

__all__ = [
    "AsyncModelWorker",
    "Constraint",
    "Delta",
    "EmbedRequest",
    "EmbedResult",
    "Event",
    "Finish",
    "GenerateRequest",
    "GenerateResult",
    "HeadraceError",
    "InferenceMetrics",
    "Message",
    "ModelInfo",
    "ModelSpec",
    "ModelWorker",
    "Progress",
    "RerankRequest",
    "RerankResult",
    "Sampling",
    "Usage",
    "__version__",
]

_HOMES = {
    "AsyncModelWorker": "headrace.model_worker",
    "Delta": "headrace.core.events",
    "EmbedRequest": "headrace.core.request",
    "EmbedResult": "headrace.core.events",
    "Event": "headrace.core.events",
    "Finish": "headrace.core.events",
    "Constraint": "headrace.core.constraint",
    "GenerateRequest": "headrace.core.request",
    "GenerateResult": "headrace.core.events",
    "HeadraceError": "headrace.core.errors",
    "InferenceMetrics": "headrace.core.metrics",
    "Message": "headrace.core.request",
    "ModelInfo": "headrace.core.model",
    "ModelSpec": "headrace.core.model",
    "ModelWorker": "headrace.sync",
    "Progress": "headrace.core.events",
    "RerankRequest": "headrace.core.request",
    "RerankResult": "headrace.core.events",
    "Sampling": "headrace.core.sampling",
    "Usage": "headrace.core.metrics",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package stays cheap."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
