"""A model folder in the layout of transformers: config.json, tokenizer files, safetensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile, Task
from headrace.models.files import check_facts, read_bounded, scaled_context
from headrace.models.safetensors import read_header

MAX_JSON = 32 << 20
MAX_JSON_VALUES = 2_000_000
"""Each takes up to a hundred bytes, more than its text."""
MAX_TEMPLATE = 1 << 20
MAX_PROMPT, MAX_PROMPTS = 1 << 14, 256
"""Characters of a prompt, which precedes each text to embed, and prompts of a model."""
INDEX = "model.safetensors.index.json"
_LENGTHS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Encoders for which transformers has no attention in blocks (SDPA, flash).
_EAGER = frozenset(
    {
        *("big_bird", "canine", "convbert", "deberta", "deberta-v2", "flaubert", "fnet", "funnel"),
        *("ibert", "lilt", "longformer", "luke", "markuplm", "megatron-bert", "mpnet", "mra"),
        *("nystromformer", "rembert", "roformer", "squeezebert", "tapas", "xlm", "xlnet", "yoso"),
    }
)


class ConfigFacts(NamedTuple):
    """Facts from a folder's files beside the weights."""

    architecture: str | None
    context_length: int | None
    chat_template: str | None
    kv_bytes_per_token: int | None


class LayerSizes(NamedTuple):
    """How wide the layers of a model are: their output, their inner part, and their heads.

    `eager` is whether the attention between all pairs of tokens is kept in memory.
    """

    hidden: int
    inner: int
    heads: int
    eager: bool = False


def describe(folder: Path) -> ModelFile:
    """Check the headers of a folder's safetensors files and describe the model.

    Raises:
        LoadFailed: config.json or a file of weights is missing or damaged.
    """
    config = read_json(folder / "config.json")
    headers = [read_header(file) for file in weight_files(folder)]
    weights: Counter[str] = Counter()
    for header in headers:
        weights.update(header.weights)
    method = _quantization_method(config)
    facts = config_facts(folder, config)
    return ModelFile(
        path=str(folder),
        format="safetensors",
        task=task_of(folder, config),
        architecture=facts.architecture,
        # Packed weights cannot be counted from the shapes.
        parameters=None if method else weights.total(),
        quantization=method or max(weights, key=lambda name: weights[name]),
        context_length=facts.context_length,
        chat_template=facts.chat_template,
        size=sum(header.size for header in headers),
        kv_bytes_per_token=facts.kv_bytes_per_token,
        **prompts_of(folder),
    )


def prompts_of(folder: Path) -> dict[str, Any]:
    """Return the prompts of an embedding model by name, and the name of the default one.

    Raises:
        LoadFailed: the file of sentence-transformers is damaged, or has prompts beyond the limits.
    """
    file = folder / "config_sentence_transformers.json"
    if not (folder / "modules.json").exists():
        return {}
    config = read_json(file) if file.exists() else {}
    table, default = config.get("prompts"), config.get("default_prompt_name")
    given = cast("dict[str, Any]", table) if _is_table(table) else {}
    is_sound = all(text is None or isinstance(text, str) for text in given.values())
    longest = max((len(text or "") for text in given.values()), default=0) if is_sound else 0
    if not is_sound or longest > MAX_PROMPT or len(given) > MAX_PROMPTS:
        raise LoadFailed(
            f"{file}: at most {MAX_PROMPTS} prompts of {MAX_PROMPT} characters are accepted."
        )
    # As in the library: a model without prompts reads queries and documents alike.
    prompts = {"query": "", "document": ""} | {name: text or "" for name, text in given.items()}
    default = None if default is None else str(default)
    check_facts(file, None, default, *given)
    return {"prompts": prompts, "default_prompt": default}


def task_of(folder: Path, config: Mapping[str, Any]) -> Task:
    """Return the task of a model, by its head and the file of sentence-transformers."""
    names = config.get("architectures")
    heads = cast("list[object]", names) if isinstance(names, list) else []
    if any(str(name).endswith("ForSequenceClassification") for name in heads):
        return "rerank"
    return "embed" if (folder / "modules.json").exists() else "generate"


def config_facts(folder: Path, config: Mapping[str, Any]) -> ConfigFacts:
    """Return the facts in the small files of a folder.

    Raises:
        LoadFailed: one of them is damaged.
    """
    # Models for images and text have a table of their own for the language model.
    text_config = config.get("text_config")
    own = cast("dict[str, Any]", text_config) if _is_table(text_config) else {}
    inner = {**config, **own}
    tokenizer = folder / "tokenizer_config.json"
    tokens = read_json(tokenizer) if tokenizer.exists() else {}
    architecture, cache = _architecture(config), _kv_bytes_per_token(inner)
    check_facts(folder / "config.json", cache, architecture, _quantization_method(config))
    return ConfigFacts(
        architecture,
        _context_length(inner, tokens),
        _chat_template(folder, tokens),
        cache,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        LoadFailed: it is missing, too long, or not a JSON object.
    """
    data = read_bounded(path, MAX_JSON)
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise LoadFailed(f"{path}: more than {MAX_JSON_VALUES} values.")
    try:
        value = json.loads(data)
        if _SURROGATE.search(data):
            # Half a character cannot be passed on.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise LoadFailed(f"{path}: not JSON: {error}.") from error
    if not _is_table(value):
        raise LoadFailed(f"{path}: not a JSON object.")
    return cast("dict[str, Any]", value)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights: those in the index, `model.safetensors`, or all.

    Raises:
        LoadFailed: there are none, or the index does not name files of the folder.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        table = read_json(index).get("weight_map")
        names = set(cast("dict[str, Any]", table).values()) if _is_table(table) else set[Any]()
        if not names or not all(_is_plain(name) for name in names):
            raise LoadFailed(f"{index}: weight_map does not name files of this folder.")
        return [folder / name for name in sorted(names)]
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadFailed(f"{folder}: no safetensors files in it.")
    return files


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _architecture(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    names = config.get("architectures")
    if isinstance(kind, str):
        return kind
    return str(cast("list[object]", names)[0]) if isinstance(names, list) and names else None


def _quantization_method(config: Mapping[str, Any]) -> str | None:
    table = config.get("quantization_config")
    if not _is_table(table):
        return None
    return str(cast("dict[str, Any]", table).get("quant_method", "quantized"))


def _number(table: Mapping[str, Any], *keys: str) -> float | None:
    for key in keys:
        value = table.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def _count(table: Mapping[str, Any], *keys: str) -> int | None:
    value = _number(table, *keys)
    return value if isinstance(value, int) and 0 < value < 1 << 32 else None


def _context_length(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    scaling = cast("dict[str, Any]", rope) if _is_table(rope) else {}
    kind = scaling.get("rope_type", scaling.get("type"))
    length = scaled_context(
        _number(config, *_LENGTHS),
        kind=kind if isinstance(kind, str) else None,
        factor=_number(scaling, "factor"),
        original=_number(scaling, "original_max_position_embeddings"),
        architecture=str(config.get("model_type", "")),
    )
    return length or scaled_context(_number(tokenizer, "model_max_length"))


def layer_sizes(folder: Path) -> LayerSizes:
    """Return the sizes in a folder's config.json; those that it does not have are large ones.

    Raises:
        LoadFailed: it is missing or damaged.
    """
    config = read_json(folder / "config.json")
    hidden = _count(config, "hidden_size", "d_model", "n_embd", "dim") or 1024
    inner = _count(config, "intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim")
    heads = _count(config, "num_attention_heads", "num_heads", "n_head", "n_heads")
    eager = config.get("model_type") in _EAGER
    return LayerSizes(hidden, inner or 4 * hidden, heads or max(1, hidden // 64), eager)


def _chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_bounded(file, MAX_TEMPLATE).decode(errors="replace")
    template = tokenizer.get("chat_template")
    # Older models with images have it in a file of its own.
    if template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [t for t in cast("list[Any]", template) if _is_table(t)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    layers = _count(config, "num_hidden_layers", "n_layer")
    heads = _count(config, "num_attention_heads", "n_head")
    width = _count(config, "hidden_size", "n_embd")
    stored = _count(config, "num_key_value_heads") or heads
    size = _count(config, "head_dim") or (width // heads if width and heads else None)
    return layers * stored * size * 2 * 2 if layers and stored and size else None
