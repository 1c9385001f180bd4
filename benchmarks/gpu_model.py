"""Model folders in the shape of well-known ones, with random weights and a tokenizer made here."""

from __future__ import annotations

import json
import string
import struct
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Shape(NamedTuple):
    """The numbers of a Qwen3; `tied` shares the embedding with the output."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    head: int = 128
    vocabulary: int = 151_936
    tied: bool = True


SHAPES = {
    "Qwen3-0.6B": Shape(1024, 28, 16, 8, 3072),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 12_288, tied=False),
    "tiny": Shape(256, 2, 4, 2, 512, head=64, vocabulary=4096),
}


def made(name: str, folder: Path, *, context: int, filled: bool) -> Path:
    """Return a folder of that shape below `folder`.

    Unless it is `filled`, its weights are a hole in the file: for engines that generate them.
    """
    shape, path = SHAPES[name], folder / name
    path.mkdir(parents=True, exist_ok=True)
    config = _config(shape, context)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(shape.vocabulary).save_pretrained(path)
    if filled:
        _fill(path)
    else:
        _dig(path / "model.safetensors", _tensors(shape))
    return path


def _config(shape: Shape, context: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": shape.vocabulary - 3,
        "eos_token_id": shape.vocabulary - 1,
    }


def _tokenizer(size: int) -> Any:
    """Return a tokenizer in which each id of the model has a text."""
    from tokenizers import (  # pyright: ignore[reportMissingImports]  # comes with transformers
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = string.ascii_letters + string.digits
    for length in (2, 3):
        pieces += map("".join, product(letters, repeat=length))
    pieces = pieces[: size - len(ENDS)]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True) for end in ENDS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ENDS[-1])


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    for layer in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (queries, shape.hidden),
            "self_attn.k_proj": (keys, shape.hidden),
            "self_attn.v_proj": (keys, shape.hidden),
            "self_attn.o_proj": (shape.hidden, queries),
            "self_attn.q_norm": (shape.head,),
            "self_attn.k_norm": (shape.head,),
            "mlp.gate_proj": (shape.inner, shape.hidden),
            "mlp.up_proj": (shape.inner, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.inner),
            "input_layernorm": (shape.hidden,),
            "post_attention_layernorm": (shape.hidden,),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    return tensors


def _dig(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors header and, as a hole in the file, zeros for the weights."""
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors.items():
        begin, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _fill(path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
