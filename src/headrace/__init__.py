"""Headrace runs language models on the engine that suits the machine, behind one API."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.core.constraint import Constraint
    from headrace.core.errors import (
        CapacityError,
        ConfigError,
        ConstraintViolated,
        ContextOverflow,
        DatabaseDown,
        DeadlineExceeded,
        Disabled,
        DoesNotFit,
        Draining,
        EngineError,
        Forbidden,
        GenerationFailed,
        HeadraceError,
        InvalidRequest,
        LoadFailed,
        Loading,
        NodeGone,
        NoNode,
        NotStarted,
        OutOfMemory,
        Quarantined,
        QueueFull,
        QueueTimeout,
        RateLimited,
        RequestError,
        Unauthorized,
        UnknownKey,
        UnknownModel,
        UnknownRequest,
        Unsupported,
        UpstreamError,
        WorkerDied,
    )
    from headrace.core.events import (
        Choice,
        Delta,
        EmbedResult,
        Event,
        Finish,
        GenerateResult,
        Progress,
        RerankResult,
        TokenCount,
        ToolCall,
        ToolCallDelta,
    )
    from headrace.core.metrics import InferenceMetrics, Usage
    from headrace.core.model import ModelInfo, ModelSpec
    from headrace.core.parameters import Parameter
    from headrace.core.request import EmbedRequest, GenerateRequest, Message, RerankRequest
    from headrace.core.sampling import Sampling
    from headrace.core.tools import Thinking, Tool, ToolChoice
    from headrace.model_worker import AsyncModelWorker
    from headrace.sync import ModelWorker

__all__ = [
    "AsyncModelWorker",
    "CapacityError",
    "Choice",
    "ConfigError",
    "Constraint",
    "ConstraintViolated",
    "ContextOverflow",
    "DatabaseDown",
    "DeadlineExceeded",
    "Delta",
    "Disabled",
    "DoesNotFit",
    "Draining",
    "EmbedRequest",
    "EmbedResult",
    "EngineError",
    "Event",
    "Finish",
    "Forbidden",
    "GenerateRequest",
    "GenerateResult",
    "GenerationFailed",
    "HeadraceError",
    "InferenceMetrics",
    "InvalidRequest",
    "LoadFailed",
    "Loading",
    "Message",
    "ModelInfo",
    "ModelSpec",
    "ModelWorker",
    "NoNode",
    "NodeGone",
    "NotStarted",
    "OutOfMemory",
    "Parameter",
    "Progress",
    "Quarantined",
    "QueueFull",
    "QueueTimeout",
    "RateLimited",
    "RequestError",
    "RerankRequest",
    "RerankResult",
    "Sampling",
    "Thinking",
    "TokenCount",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "Unauthorized",
    "UnknownKey",
    "UnknownModel",
    "UnknownRequest",
    "Unsupported",
    "UpstreamError",
    "Usage",
    "WorkerDied",
    "__version__",
]

# The records are for programs that set up logging; Python would print their names to stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "AsyncModelWorker": "headrace.model_worker",
    "CapacityError": "headrace.core.errors",
    "Choice": "headrace.core.events",
    "ConfigError": "headrace.core.errors",
    "Constraint": "headrace.core.constraint",
    "ConstraintViolated": "headrace.core.errors",
    "ContextOverflow": "headrace.core.errors",
    "DatabaseDown": "headrace.core.errors",
    "DeadlineExceeded": "headrace.core.errors",
    "Delta": "headrace.core.events",
    "Disabled": "headrace.core.errors",
    "DoesNotFit": "headrace.core.errors",
    "Draining": "headrace.core.errors",
    "EmbedRequest": "headrace.core.request",
    "EmbedResult": "headrace.core.events",
    "EngineError": "headrace.core.errors",
    "Event": "headrace.core.events",
    "Finish": "headrace.core.events",
    "Forbidden": "headrace.core.errors",
    "GenerateRequest": "headrace.core.request",
    "GenerateResult": "headrace.core.events",
    "GenerationFailed": "headrace.core.errors",
    "HeadraceError": "headrace.core.errors",
    "InferenceMetrics": "headrace.core.metrics",
    "InvalidRequest": "headrace.core.errors",
    "LoadFailed": "headrace.core.errors",
    "Loading": "headrace.core.errors",
    "Message": "headrace.core.request",
    "ModelInfo": "headrace.core.model",
    "ModelSpec": "headrace.core.model",
    "ModelWorker": "headrace.sync",
    "NotStarted": "headrace.core.errors",
    "OutOfMemory": "headrace.core.errors",
    "Parameter": "headrace.core.parameters",
    "Progress": "headrace.core.events",
    "Quarantined": "headrace.core.errors",
    "QueueFull": "headrace.core.errors",
    "QueueTimeout": "headrace.core.errors",
    "RateLimited": "headrace.core.errors",
    "RequestError": "headrace.core.errors",
    "RerankRequest": "headrace.core.request",
    "RerankResult": "headrace.core.events",
    "Sampling": "headrace.core.sampling",
    "Thinking": "headrace.core.tools",
    "TokenCount": "headrace.core.events",
    "Tool": "headrace.core.tools",
    "ToolCall": "headrace.core.events",
    "ToolCallDelta": "headrace.core.events",
    "ToolChoice": "headrace.core.tools",
    "Unauthorized": "headrace.core.errors",
    "NoNode": "headrace.core.errors",
    "NodeGone": "headrace.core.errors",
    "UnknownKey": "headrace.core.errors",
    "UnknownModel": "headrace.core.errors",
    "UnknownRequest": "headrace.core.errors",
    "Unsupported": "headrace.core.errors",
    "UpstreamError": "headrace.core.errors",
    "Usage": "headrace.core.metrics",
    "WorkerDied": "headrace.core.errors",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package stays cheap."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
