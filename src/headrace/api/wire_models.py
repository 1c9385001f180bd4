"""/v1/models and /health on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be asked for by `id` or an alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "headrace"
    aliases: list[str]
    engine: str
    state: str
    tasks: list[str]
    context_length: int | None
    parameters: int | None
    quantization: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(msgspec.Struct, frozen=True):
    """`ok`, or the state of what is not ready."""

    status: str
