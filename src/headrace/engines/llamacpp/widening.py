"""Writes a GGUF again with weights of 8 bits, which some CPUs compute faster than narrower ones.

The functions are those of the installed library, called in a process of their own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from headrace.core.environment import inherited
from headrace.core.errors import ConfigError, LoadFailed
from headrace.core.model import ModelFile
from headrace.models import converted, gguf_model
from headrace.models.gguf import MAGIC, Layout, Tensor, read_layout
from headrace.models.gguf_types import TENSOR_TYPES
from headrace.models.transfer import Progress

NARROW = frozenset({"Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K"})
"""Types of weights that are narrower than 8 bits and can be widened."""

_FILE = "model.gguf"
_Q8_0, _FILE_TYPE = 8, 7
# Weights that are unpacked at a time.
_PART = 1 << 22


def is_narrow(file: ModelFile) -> bool:
    """Whether a GGUF has weights to widen, by the name of its quantisation."""
    named = file.quantization or ""
    return file.format == "gguf" and any(named.startswith(kind) for kind in NARROW)


def widened(file: ModelFile, home: Path, progress: Progress | None) -> ModelFile:
    """Return the copy with weights of 8 bits; without `progress` only if it has been made.

    Raises:
        ConfigError: the model has several files.
        DoesNotFit: the disk is too small.
        LoadFailed: it cannot be converted.
    """
    if not is_narrow(file):
        return file
    target = converted.place(file, home, "q8-0")
    if progress is not None and not target.exists():
        if len(gguf_model.parts(Path(file.path))) > 1:
            raise ConfigError(
                "weight_type: a model in several files is not widened; merge them first."
            )
        progress("widening the weights", 0, 0)
        size = (file.parameters or file.size) * 9 // 8 + (64 << 20)
        converted.made(file, target, size, lambda folder: _run(file, folder))
    return gguf_model.describe(target / _FILE) if target.exists() else file


def _run(file: ModelFile, folder: Path) -> None:
    # Native code reads the weights.
    command = [sys.executable, "-P", "-m", __name__, file.path, str(folder / _FILE)]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, env=inherited()
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise LoadFailed(f"{file.path} could not be widened.", detail=last)


def main() -> None:
    """Write the first argument, a GGUF, to the second with weights of 8 bits."""
    source, target = map(Path, sys.argv[1:3])
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    with source.open("rb") as read, target.open("xb") as written:
        _write(ctypes.CDLL(spec.origin), read_layout(source), read, written)


def _write(library: Any, layout: Layout, read: BinaryIO, written: BinaryIO) -> None:
    tensors = [tensor._replace(**_as_written(tensor)) for tensor in layout.tensors]
    written.write(MAGIC + struct.pack("<IQQ", layout.version, len(tensors), layout.pairs))
    begin, end = layout.metadata
    read.seek(begin)
    written.write(_with_file_type(read.read(end - begin)))
    place = 0
    for tensor in tensors:
        name = tensor.name.encode()
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        written.write(struct.pack("<Q", len(name)) + name + shape)
        written.write(struct.pack("<IQ", tensor.kind, place))
        place += tensor.size + -tensor.size % layout.alignment
    for before, after in zip(layout.tensors, tensors, strict=True):
        written.write(bytes(-written.tell() % layout.alignment))
        read.seek(before.place)
        for part in _parts(library, before, after, read):
            written.write(part)


def _as_written(tensor: Tensor) -> dict[str, int]:
    kind = TENSOR_TYPES[tensor.kind]
    if kind.name not in NARROW:
        return {}
    wide = TENSOR_TYPES[_Q8_0]
    return {"kind": _Q8_0, "size": math.prod(tensor.shape) // wide.block * wide.size}


def _parts(library: Any, before: Tensor, after: Tensor, read: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a tensor, some of its rows at a time."""
    kind, width = TENSOR_TYPES[before.kind], before.shape[0]
    rows = math.prod(before.shape) // width
    if before.kind == after.kind:
        yield read.read(before.size)
        return
    unpack = getattr(library, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    pack = library.ggml_quantize_chunk
    pack.restype = ctypes.c_size_t
    some = max(1, _PART // width)
    for first in range(0, rows, some):
        count = min(some, rows - first)
        weights = count * width
        packed = read.read(weights // kind.block * kind.size)
        values = (ctypes.c_float * weights)()
        unpack(packed, values, ctypes.c_int64(weights))
        result = ctypes.create_string_buffer(weights // 32 * 34)
        size = [ctypes.c_int64(number) for number in (0, count, width)]
        pack(ctypes.c_int(_Q8_0), values, result, *size, None)
        yield result.raw


def _with_file_type(metadata: bytes) -> bytes:
    key = b"general.file_type"
    at = metadata.find(struct.pack("<Q", len(key)) + key + struct.pack("<I", 4))
    if at < 0:
        return metadata
    at += 8 + len(key) + 4
    return metadata[:at] + struct.pack("<I", _FILE_TYPE) + metadata[at + 4 :]


if __name__ == "__main__":
    main()
