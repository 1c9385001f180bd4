"""Small sound model files, so that the tests can break them."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zipfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SIZES = {0: (1, 4), 1: (1, 2), 8: (32, 34)}

Pair = tuple[str, int, Any]
Tensor = tuple[str, Sequence[int], int]

PAIRS: list[Pair] = [
    ("general.architecture", STRING, "llama"),
    ("general.file_type", U32, 7),
    ("llama.block_count", U32, 2),
    ("llama.context_length", U32, 2048),
    ("llama.embedding_length", U32, 64),
    ("llama.attention.head_count", U32, 8),
    ("llama.attention.head_count_kv", U32, 2),
    ("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, [f"token{n}" for n in range(50)])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.5] * 50)),
    ("tokenizer.ggml.bos_token_id", U32, 1),
    ("tokenizer.ggml.add_bos_token", BOOL, True),
]
TENSORS: list[Tensor] = [
    ("token_embd.weight", (64, 50), 8),
    ("blk.0.attn_q.weight", (64, 64), 1),
    ("output_norm.weight", (65,), 0),
]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(kind: int, data: Any) -> bytes:
    if kind == STRING:
        return text(data)
    if kind == ARRAY:
        inner, items = data
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack("<" + CODES[kind], data)


def gguf(
    pairs: Sequence[Pair] = PAIRS,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file, weights and all."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, kind, data in pairs:
        out += text(key) + struct.pack("<I", kind) + value(kind, data)
    offset = 0
    for name, shape, kind in tensors:
        block, size = SIZES[kind]
        count = 1
        for length in shape:
            count *= length
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, offset)
        offset = -(-(offset + count // block * size) // alignment) * alignment
    return out + b"\0" * (-len(out) % alignment) + b"\1" * offset


def with_pairs(**changed: Pair | None) -> list[Pair]:
    """Return PAIRS with values exchanged or left out; `__` stands for a dot."""
    new = {key.replace("__", "."): pair for key, pair in changed.items()}
    kept = [new.pop(pair[0], pair) for pair in PAIRS]
    return [pair for pair in [*kept, *new.values()] if pair is not None]


def safetensors(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """Return a safetensors file; each tensor has its type, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [place, place + size],
        }
        place += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"\1" * place


def wheel(
    folder: Path,
    members: Mapping[str, bytes],
    *,
    name: str = "tiny_model",
    version: str = "1.0",
    recorded: Mapping[str, bytes] | None = None,
    links: Container[str] = (),
) -> Path:
    """Write a wheel; `recorded` puts the hash of other contents into its list.

    Members in `links` are marked as symbolic links to the path that they hold.
    """
    info = f"{name}-{version}.dist-info"
    files = dict(members)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    )
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = ""
    for path, data in files.items():
        digest = hashlib.sha256((recorded or {}).get(path, data)).digest()
        code = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        rows += f"{path},sha256={code},{len(data)}\n"
    files[f"{info}/RECORD"] = (rows + f"{info}/RECORD,,\n").encode()
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            member = zipfile.ZipInfo(path)
            member.external_attr = (0o120777 if path in links else 0o100644) << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return target
