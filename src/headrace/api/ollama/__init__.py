"""Ollama's API, for clients that know no other: the table of its routes."""

from __future__ import annotations

from functools import partial

from headrace.api.exchange import Route
from headrace.api.ollama.embed import (
    OllamaEmbedding,
    OllamaEmbeddingRequest,
    OllamaEmbeddings,
    OllamaEmbedRequest,
    embed,
    embeddings,
)
from headrace.api.ollama.generate import (
    OllamaChatLine,
    OllamaChatRequest,
    OllamaGenerateLine,
    OllamaGenerateRequest,
    chat,
    generate,
)
from headrace.api.ollama.models import (
    PullLine,
    PullRequest,
    RunningModels,
    ShownModel,
    ShowRequest,
    TaggedModels,
    Version,
    ps,
    pull,
    refused,
    show,
    tags,
    version,
)

_lines = partial(Route, lines=True)
OLLAMA_ROUTES = (
    _lines("POST", "/api/chat", chat, OllamaChatLine, OllamaChatRequest, OllamaChatLine),
    _lines(
        "POST",
        "/api/generate",
        generate,
        OllamaGenerateLine,
        OllamaGenerateRequest,
        OllamaGenerateLine,
    ),
    Route("POST", "/api/embed", embed, OllamaEmbeddings, OllamaEmbedRequest),
    Route("POST", "/api/embeddings", embeddings, OllamaEmbedding, OllamaEmbeddingRequest),
    Route("GET", "/api/tags", tags, TaggedModels),
    Route("GET", "/api/ps", ps, RunningModels),
    Route("GET", "/api/version", version, Version),
    Route("POST", "/api/show", show, ShownModel, ShowRequest),
    Route("POST", "/api/create", refused, None),
    Route("POST", "/api/copy", refused, None),
    Route("POST", "/api/push", refused, None),
    Route("DELETE", "/api/delete", refused, None),
    Route("POST", "/api/blobs/{digest}", refused, None),
)
OLLAMA_ADMIN_ROUTES = (
    _lines("POST", "/api/pull", pull, PullLine, PullRequest, PullLine, admin=True),
)
