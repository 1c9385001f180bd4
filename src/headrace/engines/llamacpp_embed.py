"""Embeddings of llama.cpp: what it is loaded with for them, and one batch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp_call import error_from

if TYPE_CHECKING:
    import xllamacpp

POOLING = {"model": -1, "mean": 1, "cls": 2, "last": 3}
"""The library's enumeration as numbers."""

REQUESTS = 256
_CONTEXT = 8192
_UNNORMALISED = -1


def planned(request: OpenRequest) -> OpenRequest:
    """Return the request with a context that the library can compute at once, as it must."""
    if request.context_length is not None:
        return request
    context = min(request.model.context_length or _CONTEXT, _CONTEXT)
    return msgspec.structs.replace(request, context_length=context)


def prepare(params: Any, pooling: str, context_length: int) -> None:
    """Have a model give embeddings. An input is computed in one batch, or not at all."""
    params.embedding = True
    params.embd_normalize = _UNNORMALISED
    # With a cache of its own for each slot, inputs of different lengths are cut to equal pieces
    # and only the last piece is pooled: wrong vectors, and no error.
    params.kv_unified = True
    params.cache_prompt = False
    params.n_batch = params.n_ubatch = max(context_length, 512)
    # The library's own enumeration, of which no name is the same in all its releases.
    params.pooling_type = type(params.pooling_type)(POOLING[pooling])


def embed(server: xllamacpp.Server, batch: Sequence[Sequence[int]]) -> list[bytes]:
    """Return one vector for each list of token ids."""
    body = {"input": [list(one) for one in batch], "encoding_format": "base64"}
    answer = server.handle_embeddings(body)
    if "error" in answer:
        raise error_from(answer["error"])
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return [base64.b64decode(row["embedding"]) for row in rows]
