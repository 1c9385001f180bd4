"""Small LoRA adapters whose effect is seen in the first tokens."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.models import builders
from tests.models.builders import F32, STRING, Pair

RANK = 2
# What goes into a layer of tests.tiny_gguf, and what comes out. Keys and values are cached.
TINY: Mapping[str, tuple[int, int]] = {
    "blk.0.attn_k.weight": (32, 32),
    "blk.0.attn_v.weight": (32, 32),
    "blk.0.ffn_down.weight": (64, 32),
}
# Likewise of the folder tests.models_made.tiny_llama.
TINY_FOLDER: Mapping[str, tuple[int, int]] = {
    "model.layers.0.self_attn.k_proj": (64, 32),
    "model.layers.1.self_attn.v_proj": (64, 32),
    "model.layers.1.mlp.down_proj": (128, 64),
}
SMOLLM2: Mapping[str, tuple[int, int]] = {
    f"blk.{number}.attn_v.weight": (576, 192) for number in range(30)
}

SMOLLM2_FOLDER: Mapping[str, tuple[int, int]] = {
    f"model.layers.{number}.self_attn.v_proj": (576, 192) for number in range(30)
}


def _numbers(seed: int, count: int, size: float) -> bytes:
    chance = random.Random(seed)
    return struct.pack(f"<{count}f", *(chance.gauss(0, size) for _ in range(count)))


def gguf_adapter(
    path: Path,
    seed: int,
    *,
    layers: Mapping[str, tuple[int, int]] = TINY,
    rank: int = RANK,
    architecture: str = "llama",
    size: float = 1.0,
    pairs: Sequence[Pair] = (),
) -> Path:
    """Write an adapter with random matrices for layers, given by what goes in and comes out."""
    own: tuple[Pair, ...] = (
        ("general.architecture", STRING, architecture),
        ("general.type", STRING, "adapter"),
        ("adapter.type", STRING, "lora"),
        ("adapter.lora.alpha", F32, float(rank)),
    )
    named = {key: (key, kind, value) for key, kind, value in (*own, *pairs)}
    tensors: list[tuple[str, Sequence[int], int]] = []
    for layer, (inputs, outputs) in layers.items():
        tensors.append((f"{layer}.lora_a", (inputs, rank), 0))
        tensors.append((f"{layer}.lora_b", (rank, outputs), 0))
    written = builders.gguf([*named.values()], tensors)
    count = sum(rank * sum(sizes) for sizes in layers.values())
    path.write_bytes(written[: -4 * count] + _numbers(seed, count, size))
    return path


def peft_adapter(
    folder: Path,
    seed: int,
    *,
    layers: Mapping[str, tuple[int, int]],
    rank: int = RANK,
    size: float = 1.0,
    **config: Any,
) -> Path:
    """Write a folder of PEFT with random matrices for modules, given by what goes in and out."""
    folder.mkdir(parents=True)
    modules = sorted({layer.rpartition(".")[2] for layer in layers})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings |= {"target_modules": modules} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    header: dict[str, Any] = {}
    offset = 0
    for layer, (inputs, outputs) in layers.items():
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            end = offset + 4 * shape[0] * shape[1]
            name = f"base_model.model.{layer}.lora_{half}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (offset, end)}
            offset = end
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + _numbers(seed, offset // 4, size)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder
