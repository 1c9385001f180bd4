"""Small GGUF files that llama.cpp loads in a tenth of a second: SmolLM2's vocabulary, one layer."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.models import builders
from tests.models.builders import ARRAY, CODES, F32, STRING, U32, U64, Pair

WIDTH, INNER, HEADS = 32, 64, 4


def _skip(data: bytes, at: int, kind: int) -> int:
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != ARRAY:
        return at + struct.calcsize("<" + CODES[kind])
    inner, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != STRING:
        return at + length * struct.calcsize("<" + CODES[inner])
    for _ in range(length):
        at = _skip(data, at, STRING)
    return at


def _pairs(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each key and its type and value as they are in the file."""
    _version, _tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    at = 24
    for _ in range(pairs):
        (length,) = struct.unpack_from("<Q", data, at)
        key = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        (kind,) = struct.unpack_from("<I", data, at)
        end = _skip(data, at + 4, kind)
        yield key, data[at:end]
        at = end


@cache
def _vocabulary(source: Path) -> Mapping[str, bytes]:
    with source.open("rb") as file:
        pairs = dict(_pairs(file.read(8 << 20)))
    return {key: raw for key, raw in pairs.items() if key.startswith("tokenizer.")}


_OWN: tuple[Pair, ...] = (
    ("general.architecture", STRING, "llama"),
    ("general.alignment", U32, 32),
    ("llama.block_count", U32, 1),
    ("llama.embedding_length", U32, WIDTH),
    ("llama.feed_forward_length", U32, INNER),
    ("llama.attention.head_count", U32, HEADS),
    ("llama.attention.head_count_kv", U32, HEADS),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.dimension_count", U32, WIDTH // HEADS),
)


def _tensors(words: int) -> dict[str, tuple[int, ...]]:
    square, up = (WIDTH, WIDTH), (WIDTH, INNER)
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    layer |= {"ffn_gate": up, "ffn_up": up, "ffn_down": (INNER, WIDTH)}
    return {
        "token_embd.weight": (WIDTH, words),
        "output_norm.weight": (WIDTH,),
        **{f"blk.0.{name}.weight": shape for name, shape in layer.items()},
    }


def tiny_gguf(
    target: Path,
    source: Path,
    *,
    without: tuple[str, ...] = (),
    words: int = 49152,
    context: int = 2048,
    **changed: Any,
) -> Path:
    """Write a model with the vocabulary of `source` and random weights.

    `changed` are texts and pairs by key without `tokenizer.`, with `__` for a dot; `without` are
    keys to leave out.
    """
    raw = dict(_vocabulary(source))
    own = (*_OWN, ("llama.context_length", U64 if context >> 32 else U32, context))
    raw |= {key: struct.pack("<I", kind) + builders.value(kind, data) for key, kind, data in own}
    for name, value in changed.items():
        key = "tokenizer." + name.replace("__", ".")
        kind, data = (STRING, value) if isinstance(value, str | bytes) else value
        raw[key] = struct.pack("<I", kind) + builders.value(kind, data)
    raw = {key: value for key, value in raw.items() if key not in without}
    tensors = _tensors(words)
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(raw)))
    for key, value in raw.items():
        out += builders.text(key) + value
    offset = 0
    for name, shape in tensors.items():
        out += builders.text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", 0, offset)
        offset += -(-4 * _count(shape) // 32) * 32
    out += b"\0" * (-len(out) % 32)
    chance = random.Random(1)
    # A prime number of weights, more than there are tokens: no two tokens have the same logits.
    block = struct.pack("<49157f", *(chance.gauss(0, 0.5) for _ in range(49157)))
    out += (block * (offset // len(block) + 1))[:offset]
    target.write_bytes(out)
    return target


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
