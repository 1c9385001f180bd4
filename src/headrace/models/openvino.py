"""A folder with a model in OpenVINO's own format (IR), checked without the library.

`openvino_model.xml` is the graph, `openvino_model.bin` its weights; the graph has the place
of each constant in the weights. The tokenizer and the detokenizer are graphs too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile, Task
from headrace.models import folder
from headrace.models.files import open_regular, read_bounded

MODEL = "openvino_model.xml"
TOKENIZER = "openvino_tokenizer.xml"
DETOKENIZER = "openvino_detokenizer.xml"
TOKENS = "tokenizer_config.json"
MAX_GRAPH = 256 << 20

_TAG = re.compile(rb"<(data|layer|net)\b([^<>]*)>")
_ATTRIBUTE = re.compile(rb'\b([a-z_]+)="([^"]*)"')
_BITS = {
    "f64": 64, "i64": 64, "u64": 64, "f32": 32, "i32": 32, "u32": 32, "f16": 16, "bf16": 16,
    "i16": 16, "u16": 16, "i8": 8, "u8": 8, "boolean": 8, "i4": 4, "u4": 4, "nf4": 4,
}  # fmt: skip
_INTEGERS = frozenset({"i8", "u8", "i4", "u4", "nf4"})


class _Graph(NamedTuple):
    """A graph's inputs, the number of elements in its constants by type, and its size in bytes."""

    inputs: frozenset[str]
    constants: dict[str, int]
    size: int


def describe(path: Path) -> ModelFile:
    """Check a folder's graphs against their weights and describe the model.

    Raises:
        LoadFailed: a file is missing or damaged.
    """
    graph = _graph(path / MODEL)
    config = folder.read_json(path / "config.json") if (path / "config.json").exists() else {}
    task = _task(path, config, graph.inputs)
    for name in (TOKENIZER, *([DETOKENIZER] if task == "generate" else ())):
        if not (path / name).exists():
            raise LoadFailed(f"{path}: {name} is missing; convert the tokenizer too.")
        _graph(path / name)
    facts = folder.config_facts(path, config)
    kinds = graph.constants
    packed = _INTEGERS.intersection(kinds)
    return ModelFile(
        path=str(path),
        format="openvino",
        task=task,
        architecture=facts.architecture,
        parameters=sum(kinds.values()),
        quantization=max(packed or kinds, key=lambda kind: kinds[kind], default="f32").upper(),
        context_length=_context_length(path, task, facts.context_length),
        chat_template=facts.chat_template,
        size=graph.size,
        kv_bytes_per_token=facts.kv_bytes_per_token if task == "generate" else None,
        **folder.prompts_of(path),
    )


def _task(path: Path, config: dict[str, Any], inputs: frozenset[str]) -> Task:
    # Only models that generate have a state, and an input that orders it by beams.
    if "beam_idx" in inputs:
        return "generate"
    return "rerank" if folder.task_of(path, config) == "rerank" else "embed"


def module_types(path: Path) -> list[str]:
    """Return the module types of an embedder, in order; none without modules.json.

    Raises:
        LoadFailed: the list is damaged.
    """
    if not (path / "modules.json").exists():
        return []
    try:
        modules = json.loads(read_bounded(path / "modules.json", 1 << 20))
        return [str(module["type"]).rpartition(".")[2] for module in modules]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise LoadFailed(f"{path}: modules.json is no list of modules.") from error


def _context_length(path: Path, task: Task, configured: int | None) -> int | None:
    if task == "generate":
        return configured
    # Embedders are often trained for less than their configuration has.
    sources = ("sentence_bert_config.json", "max_seq_length"), (TOKENS, "model_max_length")
    limits = [
        folder.read_json(path / name).get(key) for name, key in sources if (path / name).exists()
    ]
    known = [
        limit for limit in (configured, *limits) if isinstance(limit, int) and 0 < limit < 1 << 32
    ]
    return min(known, default=None)


def _graph(path: Path) -> _Graph:
    text = read_bounded(path, MAX_GRAPH)
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise LoadFailed(f"{path}: it defines entities, which no model needs.")
    weights = path.with_suffix(".bin")
    with open_regular(weights) as (_, size):
        pass
    inputs: set[str] = set()
    constants: dict[str, int] = {}
    kind, name, nets = b"", b"", 0
    for tag, attributes in _tags(text):
        if tag == b"layer":
            kind, name = attributes.get(b"type", b""), attributes.get(b"name", b"")
            if kind == b"Parameter":
                inputs.add(name.decode(errors="replace"))
        elif tag == b"data" and kind == b"Const":
            element, count = _constant(path, attributes, size)
            constants[element] = constants.get(element, 0) + count
        else:
            nets += tag == b"net"
    if nets != 1 or not inputs:
        raise LoadFailed(f"{path}: it is no graph of OpenVINO.")
    return _Graph(frozenset(inputs), constants, len(text) + size)


def _tags(text: bytes) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    for tag in _TAG.finditer(text):
        yield tag[1], dict(_ATTRIBUTE.findall(tag[2]))


def _constant(path: Path, attributes: dict[bytes, bytes], weights: int) -> tuple[str, int]:
    element = attributes.get(b"element_type", b"").decode(errors="replace")
    try:
        offset, size = int(attributes[b"offset"]), int(attributes[b"size"])
    except (KeyError, ValueError) as error:
        raise LoadFailed(f"{path}: a constant without a place in the weights.") from error
    if offset < 0 or size < 0 or offset + size > weights:
        raise LoadFailed(
            f"{path}: damaged: a constant is at {offset} to {offset + size}, and the weights have "
            f"{weights} bytes."
        )
    return element, size * 8 // _BITS.get(element, 8)
