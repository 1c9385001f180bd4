"""Models that the tests make for themselves, as transformers saves them: once, and kept.

Run as a program it makes one: `models_made.py smollm2 GGUF FOLDER`. It does so in a process of its
own, so that the memory of the one that tests is not the making's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

MADE = Path(__file__).resolve().parents[1] / ".cache" / "test-home" / "made"


def smollm2(gguf: Path) -> Path:
    """Return the folder of SmolLM2 in float32, with tokenizer and template, made from its GGUF."""
    return _made("smollm2", gguf)


def tiny_llama(gguf: Path) -> Path:
    """Return the folder of a Llama of 2 layers with random weights and SmolLM2's tokenizer."""
    return _made("tiny_llama_2", smollm2(gguf))


def tiny_half(gguf: Path) -> Path:
    """Return a GGUF in F16 of one layer with random weights and SmolLM2's vocabulary."""
    from tests.tiny_gguf import tiny_gguf

    path = MADE / "tiny_half.gguf"
    MADE.mkdir(parents=True, exist_ok=True)
    with FileLock(MADE / "tiny_half.lock"):
        if not path.exists():
            making = path.with_suffix(".making")
            tiny_gguf(making, gguf, is_half=True, spread=0.2).rename(path)
    return path


def tiny_llava(gguf: Path) -> Path:
    """Return the folder of a LLaVA with random weights; an image has 5 tokens."""
    return _made("tiny_llava", tiny_llama(gguf))


def _made(name: str, source: Path) -> Path:
    folder = MADE / name
    MADE.mkdir(parents=True, exist_ok=True)
    with FileLock(MADE / f"{name}.lock"):
        if not folder.exists():
            # Under another name until it is whole.
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            command = [sys.executable, str(Path(__file__)), name, str(source), str(making)]
            subprocess.run(command, check=True, timeout=300)
            making.rename(folder)
    return folder


def _make_smollm2(gguf: Path, folder: Path) -> None:
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # It would parse the header for the configuration, the weights and the tokenizer each, and make
    # the table of names for every module.
    slow: Any = library
    slow.GGUFReader = cache(slow.GGUFReader)
    slow.get_tensor_name_map = cache(slow.get_tensor_name_map)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    ).save_pretrained(folder)


def _make_tiny_llama(smollm2: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        # So large that some tokens are far likelier than others, as in a real model.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)


def _make_tiny_llava(llama: Path, folder: Path) -> None:
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(2)
    tokenizer: Any = AutoTokenizer.from_pretrained(llama, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    image, patch = 28, 14
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
    )
    text = LlamaConfig.from_pretrained(llama)
    text.vocab_size = len(tokenizer)
    # The smallest heads that vLLM's attention takes everywhere.
    text.hidden_size, text.num_attention_heads = 128, 2
    text.num_key_value_heads, text.head_dim = 1, 64
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": image, "width": image}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": image}, crop_size=size),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
        "<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


if __name__ == "__main__":
    makers = {
        "smollm2": _make_smollm2,
        "tiny_llama_2": _make_tiny_llama,
        "tiny_llava": _make_tiny_llava,
    }
    makers[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))


def ranker_gguf(folder: Path, path: Path) -> Path:
    """Write the weights of a BERT cross-encoder, with one score, as a GGUF."""
    import gguf
    import numpy as np

    tensors: dict[str, Any] = import_module("safetensors.numpy").load_file(
        folder / "model.safetensors"
    )

    config: Any = json.loads((folder / "config.json").read_text())
    tokenizer: Any = json.loads((folder / "tokenizer.json").read_text())
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_tokenizer_model("bert")
    words = sorted(ids, key=lambda word: ids[word])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list([_in_bert(word) for word in words])
    writer.add_token_types([control if _in_bert(word) == word else normal for word in words])
    for add, word in (
        (writer.add_bos_token_id, "[CLS]"),
        (writer.add_eos_token_id, "[SEP]"),
        (writer.add_sep_token_id, "[SEP]"),
        (writer.add_pad_token_id, "[PAD]"),
        (writer.add_unk_token_id, "[UNK]"),
    ):
        add(ids[word])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    for name, values in tensors.items():
        writer.add_tensor(_bert_tensor(name), np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _in_bert(word: str) -> str:
    """Return a word of WordPiece as llama.cpp has it: the beginning of a word is marked."""
    if word.startswith("[") and word.endswith("]"):
        return word
    return word.removeprefix("##") if word.startswith("##") else f"\u2581{word}"


_BERT = {
    "bert.embeddings.word_embeddings.": "token_embd.",
    "bert.embeddings.position_embeddings.": "position_embd.",
    "bert.embeddings.token_type_embeddings.": "token_types.",
    "bert.embeddings.LayerNorm.": "token_embd_norm.",
    "bert.pooler.dense.": "cls.",
    "classifier.": "cls.output.",
    "bert.encoder.layer.": "blk.",
    "attention.self.query.": "attn_q.",
    "attention.self.key.": "attn_k.",
    "attention.self.value.": "attn_v.",
    "attention.output.dense.": "attn_output.",
    "attention.output.LayerNorm.": "attn_output_norm.",
    "intermediate.dense.": "ffn_up.",
    "output.dense.": "ffn_down.",
    "output.LayerNorm.": "layer_output_norm.",
}


def _bert_tensor(name: str) -> str:
    for theirs, ours in _BERT.items():
        name = name.replace(theirs, ours)
    return name
