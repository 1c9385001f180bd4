"""JSON schemas of what Ollama and llama-server answer, written by their documentation.

They name what clients read: types, fields that are always there, values that they compare.
"""

from __future__ import annotations

from typing import Any

import jsonschema_rs

_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_NUMBER: dict[str, Any] = {"type": "number", "minimum": 0}
_TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"}
_TAGGED = {"type": "string", "pattern": ":"}


def _object(needed: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": needed | optional, "required": [*needed]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_CALL = _object(
    {"function": _object({"name": _TEXT, "arguments": {"type": "object"}}, index=_COUNT)}, id=_TEXT
)
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _TEXT}, thinking=_TEXT, tool_calls=_list(_CALL)
)
_HEAD = {"model": _TEXT, "created_at": _TIME}
_FIGURES = dict.fromkeys(
    (
        "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration",
        "eval_count", "eval_duration",
    ),
    _COUNT,
)  # fmt: skip
_DONE = {"done": {"const": True}, "done_reason": {"enum": ["stop", "length"]}, **_FIGURES}
_LOADED = {"done": {"const": True}, "done_reason": {"enum": ["load", "unload"]}}
_MORE = {"done": {"const": False}}
_CONTEXT = {"context": _list(_COUNT)}
_DETAILS = _object(
    {"format": _TEXT, "family": _TEXT, "families": _list(_TEXT), "parameter_size": _TEXT,
     "quantization_level": _TEXT, "parent_model": _TEXT}
)  # fmt: skip
_MODEL = {
    "name": _TAGGED, "model": _TAGGED, "size": _COUNT, "details": _DETAILS,
    "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}  # fmt: skip
_CAPABILITIES = ["completion", "tools", "vision", "embedding", "insert", "thinking"]
_LOGPROB = _object({"token": _TEXT, "logprob": {"type": "number", "maximum": 0}})
_FLOATS = _list({"type": "number"})

OLLAMA = {
    "chat": {
        "oneOf": [
            _object({**_HEAD, "message": _MESSAGE, **end}, logprobs=_list(_LOGPROB))
            for end in (_MORE, _DONE, _LOADED)
        ]
    },
    "generate": {
        "oneOf": [
            _object({**_HEAD, "response": _TEXT, **end}, thinking=_TEXT, logprobs=_list(_LOGPROB))
            for end in (_MORE, {**_DONE, **_CONTEXT}, _LOADED)
        ]
    },
    "embed": _object(
        {"model": _TEXT, "embeddings": _list(_FLOATS), "total_duration": _COUNT,
         "load_duration": _COUNT, "prompt_eval_count": _COUNT}
    ),
    "embeddings": _object({"embedding": _FLOATS}),
    "tags": _object({"models": _list(_object({**_MODEL, "modified_at": _TIME}))}),
    "ps": _object(
        {"models": _list(_object({**_MODEL, "expires_at": _TIME, "size_vram": _COUNT}))}
    ),
    "version": _object({"version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+"}}),
    "show": _object(
        {"license": _TEXT, "modelfile": _TEXT, "parameters": _TEXT, "template": _TEXT,
         "details": _DETAILS, "modified_at": _TIME,
         "model_info": _object({"general.architecture": _TEXT, "general.parameter_count": _COUNT}),
         "capabilities": _list({"enum": _CAPABILITIES})}
    ),
    "pull": _object({"status": _TEXT}, digest=_TEXT, total=_COUNT, completed=_COUNT),
    "error": _object({"error": _TEXT}),
}  # fmt: skip
"""By the last part of a route: its answer, or each line of it."""

_CANDIDATE = {
    "id": _COUNT, "token": _TEXT, "bytes": _list(_COUNT),
    "logprob": {"type": "number", "maximum": 0},
}  # fmt: skip
_PROBABILITIES = _list(_object({**_CANDIDATE, "top_logprobs": _list(_object(_CANDIDATE))}))
_PART = {
    "index": {"const": 0}, "content": _TEXT, "tokens": _list(_COUNT),
    "id_slot": {"type": "integer"},
    "tokens_predicted": _COUNT, "tokens_evaluated": _COUNT,
}  # fmt: skip
_TIMINGS = _object(
    dict.fromkeys(("cache_n", "prompt_n", "predicted_n"), _COUNT)
    | {
        f"{phase}_{name}": _NUMBER
        for phase in ("prompt", "predicted")
        for name in ("ms", "per_token_ms", "per_second")
    }
)
_WHOLE = _object(
    {**_PART, "stop": {"const": True}, "model": _TEXT, "prompt": _TEXT, "truncated": _FLAG,
     "generation_settings": {"type": "object"}, "has_new_line": _FLAG, "stopping_word": _TEXT,
     "stop_type": {"enum": ["eos", "limit", "word"]}, "tokens_cached": _COUNT,
     "timings": _TIMINGS},
    completion_probabilities=_PROBABILITIES,
)  # fmt: skip
_ERROR = _object({"message": _TEXT, "type": _TEXT}, code={"type": ["string", "integer", "null"]})
LLAMA_SERVER = {
    "completion": _WHOLE,
    "event": {
        "oneOf": [
            _object({**_PART, "stop": {"const": False}}, completion_probabilities=_PROBABILITIES),
            _WHOLE,
        ]
    },
    "props": _object(
        {"default_generation_settings": _object({"n_ctx": _COUNT, "params": {"type": "object"}}),
         "total_slots": {"type": "integer", "minimum": 1}, "model_path": _TEXT,
         "chat_template": _TEXT, "modalities": _object({"vision": _FLAG, "audio": _FLAG}),
         "build_info": _TEXT, "is_sleeping": _FLAG}
    ),
    "apply-template": _object({"prompt": _TEXT}),
    "tokenize": _object({"tokens": _list(_COUNT)}),
    "detokenize": _object({"content": _TEXT}),
    "error": _object({"error": _ERROR}),
}  # fmt: skip
"""By the last part of a route; `event` is each event of a streamed completion."""


def hold(schemas: dict[str, Any], name: str, value: Any) -> None:
    """Check a value by a schema."""
    errors = [error.message for error in jsonschema_rs.iter_errors(schemas[name], value)]
    assert not errors, f"{name}: {errors}: {value}"
