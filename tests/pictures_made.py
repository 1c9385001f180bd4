"""Pictures and a projector of random weights, made by the tests."""

from __future__ import annotations

import base64
import io
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image
from tests.models.builders import ARRAY, BOOL, F32, STRING, U32, Pair, gguf

from headrace.core.media import Pictures
from headrace.core.request import GenerateRequest, Message


def png(width: int = 64, height: int = 48, seed: int = 1) -> bytes:
    """Return a PNG of random colours."""
    noise = random.Random(seed)
    rows = b"".join(b"\0" + noise.randbytes(3 * width) for _ in range(height))
    return png_of(width, height, zlib.compress(rows))


def png_of(width: int, height: int, data: bytes) -> bytes:
    """Return a PNG with this header and compressed data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def broken() -> list[bytes]:
    """Return 50 files that begin like pictures, most of which cannot be decoded."""
    noise, sound = random.Random(3), [png(), jpeg()]
    rows = zlib.compress(bytes(48 * (3 * 64 + 1)))
    files = [png_of(64, 48, body) for body in (b"", b"garbage", rows[:9], rows[:-9], rows[::-1])]
    for start in sound:
        files += [start[: len(start) * part // 12] for part in range(1, 10)]
    while len(files) < 50:
        data = bytearray(sound[len(files) % 2])
        for _ in range(40):
            data[noise.randrange(30, len(data))] = noise.randrange(256)
        files.append(bytes(data))
    return files


def jpeg() -> bytes:
    """Return a JPEG of 64 x 48 pixels."""
    out = io.BytesIO()
    Image.frombytes("RGB", (64, 48), random.Random(1).randbytes(64 * 48 * 3)).save(out, "JPEG")
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Return a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, Any]:
    """Return a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def question(*parts: bytes | str, role: str = "user") -> dict[str, Any]:
    """Return a message of texts and pictures."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else image_part(part)
        for part in parts
    ]
    return {"role": role, "content": content}


def asked(*parts: bytes | str, **fields: Any) -> GenerateRequest:
    """Return a core request with one message of texts and pictures."""
    pictures = Pictures()
    content = tuple(
        part if isinstance(part, str) else pictures.add(part, f"messages[0].content[{number}]")
        for number, part in enumerate(parts)
    )
    return GenerateRequest(messages=(Message("user", content),), media=pictures.data, **fields)


def projector(path: Path, *, width: int = 576, image: int = 56, patch: int = 14) -> Path:
    """Write an mmproj of random weights for a model of that width, in the manner of Gemma 3."""
    inner, hidden = 32, 64
    places = (image // patch) ** 2
    tensors: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (patch, patch, 3, inner),
        "v.patch_embd.bias": (inner,),
        "v.position_embd.weight": (inner, places),
        "v.post_ln.weight": (inner,),
        "v.post_ln.bias": (inner,),
        "mm.input_projection.weight": (width, inner),
        "mm.soft_emb_norm.weight": (inner,),
    }
    shapes = dict.fromkeys(("ln1", "ln2"), (inner,))
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (inner, inner))
    shapes |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        tensors[f"v.blk.0.{name}.weight"] = shape
        tensors[f"v.blk.0.{name}.bias"] = shape[-1:]
    vision = "clip.vision."
    pairs: list[Pair] = [
        ("general.architecture", STRING, "clip"),
        ("general.type", STRING, "mmproj"),
        ("clip.projector_type", STRING, "gemma3"),
        ("clip.has_vision_encoder", BOOL, True),
        ("clip.use_gelu", BOOL, True),
        (vision + "image_size", U32, image),
        (vision + "patch_size", U32, patch),
        (vision + "embedding_length", U32, inner),
        (vision + "feed_forward_length", U32, hidden),
        (vision + "projection_dim", U32, width),
        (vision + "block_count", U32, 1),
        (vision + "attention.head_count", U32, 4),
        (vision + "attention.layer_norm_epsilon", F32, 1e-6),
        (vision + "projector.scale_factor", U32, 2),
        (vision + "image_mean", ARRAY, (F32, [0.5] * 3)),
        (vision + "image_std", ARRAY, (F32, [0.5] * 3)),
    ]
    made = gguf(pairs, [(name, shape, 0) for name, shape in tensors.items()])
    size = sum(-(-4 * math.prod(shape) // 32) * 32 for shape in tensors.values())
    noise = random.Random(7)
    weights = struct.pack(f"<{size // 4}f", *(noise.gauss(0.0, 0.1) for _ in range(size // 4)))
    path.write_bytes(made[:-size] + weights)
    return path
