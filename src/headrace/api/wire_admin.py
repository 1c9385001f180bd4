"""/admin on the wire, and what llama-server and Ollama have of it.

The answers are those of headrace.core.status.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Reference = Annotated[str, Meta(min_length=1, max_length=512)]


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model, by its name or an alias."""

    model: Reference


class LoadRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be loaded; a reference that is not served yet is added with these settings."""

    settings: dict[str, Any] | None = None


class PinRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pinned model never has to make room for another."""

    pinned: bool = True


class UpdateRequest(ModelRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings to be changed: `keep_alive`, `enabled`, `options.threads`, ..."""

    settings: dict[str, Any]


class Success(msgspec.Struct, frozen=True):
    """llama-server's answer."""

    success: bool = True


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model in Ollama's words; sizes are bytes. `expires_at` null is never."""

    name: str
    model: str
    size: int
    size_vram: int
    expires_at: str | None
    context_length: int | None


class RunningModels(msgspec.Struct, frozen=True):
    """Ollama's answer."""

    models: list[RunningModel]
