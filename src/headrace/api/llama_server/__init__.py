"""The routes of llama-server that editors and its other clients use."""

from __future__ import annotations

from headrace.api.exchange import Route
from headrace.api.llama_server.answer import CompletionPart, LlamaCompletion
from headrace.api.llama_server.completion import (
    InfillRequest,
    LlamaCompletionRequest,
    completion,
    infill,
)
from headrace.api.llama_server.props import (
    Props,
    Rendered,
    TemplateRequest,
    apply_template,
    props,
)

LLAMA_ROUTES = (
    *(
        Route("POST", path, completion, LlamaCompletion, LlamaCompletionRequest, CompletionPart)
        for path in ("/completion", "/completions")
    ),
    Route("POST", "/infill", infill, LlamaCompletion, InfillRequest, CompletionPart),
    Route("GET", "/props", props, Props),
    Route("POST", "/apply-template", apply_template, Rendered, TemplateRequest),
)
