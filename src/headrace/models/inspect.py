"""Identifies and checks the model at a path, without any native library."""

from __future__ import annotations

from pathlib import Path

from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile
from headrace.models import folder, gguf_model, openvino
from headrace.models.files import open_regular
from headrace.models.gguf import MAGIC
from headrace.models.projector import is_projector

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
MAX_ENTRIES = 100_000
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive (or a pickle of PyTorch), which is not loaded"),
    (b"version https://git-lfs", "a pointer of Git LFS; get the file itself with: git lfs pull"),
    (b"tjgg", "the GGML format that came before GGUF; convert it with llama.cpp"),
    (b"fmgg", "the GGML format that came before GGUF; convert it with llama.cpp"),
    (b"lmgg", "the GGML format that came before GGUF; convert it with llama.cpp"),
    (b"<!", "a web page; the download went wrong"),
    (b"<html", "a web page; the download went wrong"),
)


def inspect(path: Path) -> ModelFile:
    """Check a GGUF file, or a folder with one GGUF model, safetensors or OpenVINO IR.

    Raises:
        LoadFailed: it is none of these, cannot be read, or its header is inconsistent.
    """
    try:
        if path.is_dir():
            return _inspect_folder(path)
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{path}: {error}.") from error
    with open_regular(path) as (file, size):
        first = file.read(64) or b""
    if size == 0:
        raise LoadFailed(f"{path}: the file is empty.")
    if first.startswith(MAGIC):
        return gguf_model.describe(path)
    raise LoadFailed(f"{path}: {_why_not_loaded(path, first)}.")


def _why_not_loaded(path: Path, first: bytes) -> str:
    if path.suffix.lower() in PICKLES or (first[:1] == b"\x80" and first[1:2] in b"\2\3\4\5"):
        return "a pickle, which could run any code and is not loaded; use GGUF or safetensors"
    if path.suffix == ".safetensors":
        return f"give the folder that has config.json beside it: {path.parent}"
    reasons = (reason for magic, reason in _OTHER_FORMATS if first.startswith(magic))
    shown = first[:8].hex(" ")
    return next(reasons, f"neither GGUF nor safetensors; it begins with the bytes {shown}")


def _inspect_folder(path: Path) -> ModelFile:
    names: list[str] = []
    for entry in path.iterdir():
        names.append(entry.name)
        if len(names) > MAX_ENTRIES:
            raise LoadFailed(f"{path}: more than {MAX_ENTRIES} entries; this is no model folder.")
    models = _gguf_models(sorted(names))
    if len(models) == 1:
        return gguf_model.describe(path / models[0])
    if models:
        raise LoadFailed(f"{path}: several models; name one: {', '.join(models[:20])}.")
    if openvino.MODEL in names:
        return openvino.describe(path)
    if any(name.endswith(".safetensors") for name in names):
        return folder.describe(path)
    if any(Path(name).suffix.lower() in PICKLES for name in names):
        raise LoadFailed(f"{path}: {_why_not_loaded(Path('weights.bin'), b'')}.")
    raise LoadFailed(f"{path}: a folder with neither GGUF nor safetensors nor OpenVINO files.")


def _gguf_models(names: list[str]) -> list[str]:
    """Return a name for each model, without projectors and later parts."""
    files = [n for n in names if n.endswith(".gguf") and not is_projector(n)]
    return [n for n in files if not gguf_model.is_later_part(n)]
