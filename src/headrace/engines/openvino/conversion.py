"""Converts models in other formats to OpenVINO IR, once, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.core.environment import inherited
from headrace.core.errors import ConfigError, LoadFailed
from headrace.core.install import install_command
from headrace.core.model import ModelFile
from headrace.engines.openvino.vocabulary import without_telemetry
from headrace.models import converted, folder, gguf_model, openvino
from headrace.models.gguf import read_header
from headrace.models.transfer import Progress, disk_full, silent

# For a while there is a GGUF in F16 beside the result.
_BYTES_PER_WEIGHT = 4
_COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
_COPIED_FOR_VECTORS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_DISK_FULL = ("No space left", "Disk quota exceeded", "File too large")


def needs_conversion(file: ModelFile) -> bool:
    """Whether OpenVINO cannot read a model as it is.

    It rounds most GGUFs, and opens each for writing, which a model's process may not.
    """
    return file.format != "openvino"


def prepared(file: ModelFile, home: Path, *_: object) -> ModelFile:
    """Return the model that OpenVINO loads: the same, or the converted one.

    Raises:
        LoadFailed: it has not been converted.
    """
    if not needs_conversion(file):
        return file
    target = converted.place(file, home)
    if not target.exists():
        raise not_converted(file)
    return openvino.describe(target)


def not_converted(file: ModelFile) -> LoadFailed:
    """Return the error for a model in another format, with the command to convert it."""
    return LoadFailed(
        f"OpenVINO does not read {file.format} here. Convert the model once, with: "
        "headrace pull MODEL --for openvino"
    )


def convert(file: ModelFile, home: Path, progress: Progress = silent) -> ModelFile:
    """Convert a model for OpenVINO, unless that was done before. Blocking.

    Raises:
        ConfigError: a library for the conversion is not installed.
        LoadFailed: the model cannot be converted.
        DoesNotFit: the disk is too small.
    """
    if not needs_conversion(file):
        return file

    def make(partial: Path) -> None:
        progress("converting for openvino", 0, 0)
        _run_conversion(file, partial)
        _check(file, openvino.describe(partial))

    size = (file.parameters or file.size) * _BYTES_PER_WEIGHT
    return openvino.describe(converted.made(file, converted.place(file, home), size, make))


def _run_conversion(file: ModelFile, partial: Path) -> None:
    # Native code reads the weights, and needs much memory.
    command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, file.path, str(partial)]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, env=inherited()
    )
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or ["it died"])[-1]
    if any(word in done.stderr for word in _DISK_FULL):
        raise disk_full(partial.parent)
    if "ModuleNotFoundError" in last:
        raise ConfigError(
            "Conversion needs more libraries: "
            f"{install_command('openvino', 'transformers')} ({last})"
        )
    raise LoadFailed(f"{file.path} could not be converted for OpenVINO.", detail=last)


def _check(file: ModelFile, result: ModelFile) -> None:
    # The counts may differ by constants computed from weights, never by a layer.
    before, after = file.parameters or 0, result.parameters or 0
    if before and abs(after - before) > before // 20:
        raise LoadFailed(f"The conversion has {after} weights instead of {before}.")


def main() -> None:
    """Convert the first argument, a GGUF file or a folder, into the second, a folder."""
    without_telemetry()
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if source.is_dir():
        from_folder(source, target)
    else:
        from_gguf(source, target)


def from_gguf(source: Path, target: Path) -> None:
    """Write a GGUF's IR, with 16 bits for each weight."""
    import openvino_genai as genai

    # The library, whose code is native, reads only what was written here.
    plain = target / "plain.gguf"
    widen(source, plain)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 8
    tokenizer = genai.Tokenizer(str(plain), enable_save_ov_model=True)
    genai.ContinuousBatchingPipeline(
        str(plain), tokenizer, scheduler, "CPU", enable_save_ov_model=True
    )
    plain.unlink()
    for name, content in _configuration(source):
        (target / name).write_text(json.dumps(content), encoding="utf-8")


def widen(source: Path, target: Path) -> None:
    """Write a GGUF of the same model with F16 in place of every quantised type.

    Raises:
        LoadFailed: a weight is too large for F16.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    readers = [GGUFReader(part) for part in gguf_model.parts(source)]
    fields = readers[0].fields
    writer = GGUFWriter(target, fields["general.architecture"].contents())
    for name, field in fields.items():
        if not name.startswith(("GGUF.", "split.")) and name not in _REWRITTEN_KEYS:
            array = field.types[0] == GGUFValueType.ARRAY
            inner = field.types[-1] if array else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(1)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    unpacked = GGMLQuantizationType.F32
    for tensor in tensors:
        kind = np.dtype(np.float32 if tensor.tensor_type == unpacked else np.float16)
        shape = [int(length) for length in reversed(tensor.shape)]
        size = int(np.prod(shape)) * kind.itemsize
        writer.add_tensor_info(tensor.name, shape, kind, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type != unpacked:
            values = values.astype(np.float16)
        if not np.isfinite(values).all():
            raise LoadFailed(f"{tensor.name} has weights that are too large for F16.")
        writer.write_tensor_data(values)
    writer.close()


_REWRITTEN_KEYS = frozenset(
    {"general.architecture", "general.file_type", "general.quantization_version"}
)


def _configuration(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and contents of the small files that describe a model, from its header."""
    model = gguf_model.describe(source)
    metadata = read_header(source).metadata
    keys = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
    }
    values = ((ours, metadata.get(f"{model.architecture}.{key}")) for ours, key in keys.items())
    numbers = {name: value for name, value in values if isinstance(value, int)}
    lengths = {"max_position_embeddings": model.context_length} if model.context_length else {}
    yield "config.json", {"model_type": model.architecture, **numbers, **lengths}
    if model.chat_template:
        yield "tokenizer_config.json", {"chat_template": model.chat_template}


def from_folder(source: Path, target: Path) -> None:
    """Write the IR of an embedder or a cross-encoder, in the precision of its weights.

    Raises:
        LoadFailed: it is another kind of model.
    """
    import openvino as ov
    import torch
    import transformers
    from openvino_tokenizers import convert_tokenizer

    config = folder.read_json(source / "config.json")
    task = folder.task_of(source, config)
    if task == "generate":
        raise LoadFailed("Only embedders and rerankers are converted from safetensors; use GGUF.")
    kind: Any = getattr(
        transformers, "AutoModel" if task == "embed" else "AutoModelForSequenceClassification"
    )
    model = kind.from_pretrained(source, local_files_only=True, use_safetensors=True).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    example = dict(tokenizer(["a b", "c"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        graph = ov.convert_model(model, example_input=example)
    ov.save_model(graph, target / openvino.MODEL, compress_to_fp16=False)
    graphs = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, graph in zip((openvino.TOKENIZER, openvino.DETOKENIZER), graphs, strict=True):
        ov.save_model(graph, target / name)
    for name in (*_COPIED, *_COPIED_FOR_VECTORS):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    for pooling in source.glob("*_Pooling/config.json"):
        (target / pooling.parent.name).mkdir()
        shutil.copyfile(pooling, target / pooling.parent.name / "config.json")


if __name__ == "__main__":
    main()
