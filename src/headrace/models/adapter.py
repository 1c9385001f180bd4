"""Reads and checks LoRA adapters before any library sees them: GGUF files and folders of PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from headrace.core.adapter import Adapter, AdapterFile
from headrace.core.errors import LoadFailed, RequestError
from headrace.core.model import ModelFile
from headrace.models import gguf, safetensors
from headrace.models.files import open_regular
from headrace.models.folder import read_json, weight_files
from headrace.models.gguf_model import parts
from headrace.models.reference import parse
from headrace.models.store import Store
from headrace.models.transfer import Progress

MAX_RANK = 512
"""The largest rank that the engines have kernels for."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KINDS: Mapping[str, str] = {"gguf": "a GGUF file", "safetensors": "a folder of PEFT"}
_HINTS: Mapping[str, str] = {
    "gguf": "llama.cpp's convert_lora_to_gguf.py makes one of a folder of PEFT",
    "safetensors": f"with {CONFIG} and {WEIGHTS}",
}
# What changes more than the product of two matrices, and is not computed.
_UNUSUAL = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens"),
    *("lora_bias", "layer_replication", "target_parameters", "use_qalora", "use_bdlora"),
    *("arrow_config", "fan_in_fan_out"),
)
# Ways to begin a training that change the model, too.
_CHANGED_MODELS = ("pissa", "olora", "corda", "loftq", "lora_ga")

Shape = tuple[int, ...]


class _Pair(msgspec.Struct, frozen=True):
    """Two matrices of a layer: what goes in times the rank, and the rank times what comes out."""

    inputs: int
    rank: int
    inner: int
    outputs: int
    more: Shape = ()


def inspect(path: Path) -> AdapterFile:
    """Check the header of an adapter.

    Raises:
        LoadFailed: it is damaged, or no LoRA adapter.
    """
    return _read(path)[0]


def checked(path: Path, model: ModelFile) -> AdapterFile:
    """Return an adapter that goes with a model: of its kind, its architecture and its layers.

    Raises:
        LoadFailed: it is damaged or does not fit, with the first difference.
    """
    file, pairs, architecture = _read(path)
    if model.format not in _KINDS:
        _refuse(path, f"models in the format {model.format} have no adapters here")
    if file.format != model.format:
        _refuse(
            path,
            f"it is {_KINDS[file.format]}, and the model needs {_KINDS[model.format]}: "
            f"{_HINTS[model.format]}",
        )
    if architecture is not None and architecture != model.architecture:
        _refuse(path, f"it was made for {architecture}, and the model is {model.architecture}")
    layers = _gguf_layers(model) if file.format == "gguf" else _folder_layers(Path(model.path))
    for layer, pair in pairs.items():
        _check_pair(path, layer, pair, layers.get(layer))
    return file


def fetched(
    adapters: Mapping[str, Adapter], model: ModelFile, store: Store, on_progress: Progress
) -> Iterator[AdapterFile]:
    """Yield the adapters of a model, downloaded if needed, that are known to go with it. Blocking.

    Raises:
        LoadFailed: names the adapter whose reference is invalid, that is missing or does not fit.
        HeadraceError: a download failed.
    """
    for name, settings in adapters.items():
        if model.task != "generate":
            raise LoadFailed(f"Adapter {name}: the model's task is {model.task}, not generate.")
        try:
            path = store.fetch(parse(settings.source), on_progress, inspect)
            file = checked(path, model)
        except (LoadFailed, RequestError) as error:
            raise LoadFailed(f"Adapter {name}: {error.message}") from error
        yield msgspec.structs.replace(file, name=name, scale=settings.scale)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise LoadFailed(f"{path}: {reason}.")


def _check_pair(path: Path, layer: str, pair: _Pair, shape: Shape | None) -> None:
    if shape is None:
        _refuse(path, f"it changes {layer[:120]!r}, which the model does not have")
    wanted = (pair.inputs, pair.outputs, *pair.more)
    if shape != wanted:
        _refuse(path, f"{layer[:120]!r} is {_by(shape)} in the model, and {_by(wanted)} in it")


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _read(path: Path) -> tuple[AdapterFile, Mapping[str, _Pair], str | None]:
    if path.is_dir():
        return _read_folder(path)
    with open_regular(path) as (file, _size):
        is_gguf = (file.read(4) or b"") == gguf.MAGIC
    if not is_gguf:
        _refuse(path, f"no adapter: it is neither a GGUF file nor a folder with {CONFIG}")
    return _read_gguf(path)


def _read_gguf(path: Path) -> tuple[AdapterFile, Mapping[str, _Pair], str | None]:
    header = gguf.read_header(path)
    kind = header.metadata.get("general.type")
    if kind != "adapter" or header.metadata.get("adapter.type") != "lora":
        _refuse(path, f"no LoRA adapter: its general.type is {str(kind or 'not given')[:40]!r}")
    if header.metadata.get("adapter.alora.invocation_tokens") is not None:
        _refuse(path, "an adapter that begins at tokens of the prompt (aLoRA) is not supported")
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        _refuse(path, "its alpha is no number")
    halves = _halves(path, header.shapes, ".lora_a", ".lora_b")
    pairs = dict(_gguf_pairs(halves))
    file = AdapterFile(
        path=str(path),
        format="gguf",
        rank=_rank(path, pairs),
        size=header.size,
        alpha=float(alpha),
    )
    return file, pairs, str(header.metadata.get("general.architecture"))


def _gguf_pairs(halves: Mapping[str, tuple[Shape, Shape]]) -> Iterator[tuple[str, _Pair]]:
    for layer, (down, up) in halves.items():
        if layer == "token_embd.weight":
            # The embeddings are looked up, not multiplied: the file has both matrices turned.
            yield layer, _Pair(up[1], down[0], up[0], down[1])
        else:
            yield layer, _Pair(down[0], down[1], up[0], up[1], down[2:])


def _halves(
    path: Path, shapes: Mapping[str, Shape], first: str, second: str
) -> dict[str, tuple[Shape, Shape]]:
    """Return the shapes of both matrices of each layer."""
    layers = dict.fromkeys(name.removesuffix(first).removesuffix(second) for name in shapes)
    halves: dict[str, tuple[Shape, Shape]] = {}
    for layer in layers:
        down, up = shapes.get(layer + first), shapes.get(layer + second)
        if layer in shapes:
            _refuse(path, f"{layer[:120]!r} is no matrix of a LoRA adapter, and is not supported")
        if down is None or up is None:
            _refuse(path, f"{layer[:120]!r} has one of two matrices")
        if len(down) < 2 or len(down) != len(up) or down[2:] != up[2:]:
            _refuse(path, f"the matrices of {layer[:120]!r} are {_by(down)} and {_by(up)}")
        halves[layer] = (down, up)
    return halves


def _rank(path: Path, pairs: Mapping[str, _Pair]) -> int:
    for layer, pair in pairs.items():
        if pair.rank != pair.inner:
            ranks = f"{pair.rank} and {pair.inner}"
            _refuse(path, f"the matrices of {layer[:120]!r} have the ranks {ranks}")
        if pair.rank > MAX_RANK:
            _refuse(path, f"{layer[:120]!r} has rank {pair.rank}; {MAX_RANK} is the most")
    if not pairs:
        _refuse(path, "there are no matrices in it")
    return max(pair.rank for pair in pairs.values())


def _read_folder(path: Path) -> tuple[AdapterFile, Mapping[str, _Pair], str | None]:
    if not (path / CONFIG).exists():
        _refuse(path, f"no adapter: there is no {CONFIG} in it")
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(path, f"no LoRA adapter: its peft_type is {str(kind or 'not given')[:40]!r}")
    unusual = [name for name in _UNUSUAL if config.get(name)]
    if config.get("bias", "none") != "none":
        unusual.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED_MODELS):
        unusual.append("init_lora_weights (PEFT can save it converted)")
    if unusual:
        _refuse(path, f"an adapter with {unusual[0]} is not supported")
    if not (path / WEIGHTS).exists():
        _refuse(path, f"there is no {WEIGHTS} in it; others, as pickles, are not loaded")
    header = safetensors.read_header(path / WEIGHTS)
    shapes = {name.removeprefix(PREFIX): shape for name, shape in header.shapes.items()}
    halves = _halves(path, shapes, ".lora_A.weight", ".lora_B.weight")
    pairs = {
        layer: _Pair(down[1], down[0], up[1], up[0])
        for layer, (down, up) in halves.items()
        if _is_flat(path, layer, down)
    }
    file = AdapterFile(
        path=str(path),
        format="safetensors",
        rank=_rank(path, pairs),
        size=header.size,
        alpha=_alpha(path, config),
        root_rank=bool(config.get("use_rslora")),
    )
    return file, pairs, None


def _is_flat(path: Path, layer: str, shape: Shape) -> bool:
    if len(shape) != 2:
        _refuse(path, f"the matrices of {layer[:120]!r} have {len(shape)} dimensions")
    return True


def _alpha(path: Path, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is None or not is_number or not math.isfinite(alpha):
        _refuse(path, f"lora_alpha in {CONFIG} is no number")
    if config.get("alpha_pattern"):
        _refuse(path, "an adapter with alpha_pattern is not supported")
    return float(alpha)


def _gguf_layers(model: ModelFile) -> Mapping[str, Shape]:
    return _merged(gguf.read_header(part).shapes for part in parts(Path(model.path)))


def _folder_layers(folder: Path) -> Mapping[str, Shape]:
    """Return the shapes of a model's layers, inputs first, by the names of its modules."""
    shapes = _merged(safetensors.read_header(file).shapes for file in weight_files(folder))
    return {
        name.removesuffix(".weight"): (shape[1], shape[0])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def _merged(tables: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    return {name: shape for table in tables for name, shape in table.items()}
