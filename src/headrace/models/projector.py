"""Projectors: the files beside a GGUF that make the model's embeddings of media (mmproj)."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import msgspec

from headrace.core.audio import MAX_AUDIO_SECONDS
from headrace.core.errors import LoadFailed
from headrace.models.gguf import GgufHeader, read_header

_MARK = re.compile(r"mmproj", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTIZATION = re.compile(r"[-._](?:UD[-_])?(?:I?Q\d\w*|BF16|F16|F32|FP16|MXFP4\w*)$", re.I)
_PREFERRED = ("f16", "fp16", "bf16", "q8_0", "f32")
_LONGEST = 1 << 20
# Most encoders of audio compute 30 s of 50 frames at once; others all, of 12.5 frames a second.
_AUDIO_PLACES = 25 * MAX_AUDIO_SECONDS // 2
# Samples and spectra are made of the whole sound, and copied.
_SAMPLES = MAX_AUDIO_SECONDS << 18


class Projector(msgspec.Struct, frozen=True):
    """A projector. `size` is that of its weights, `computed` that of its activations, in bytes.

    `width` is that of the embeddings that it makes; of `vision` and `audio` it has the encoders.
    """

    path: str
    size: int
    width: int
    computed: int
    vision: bool = True
    audio: bool = False


def is_projector(name: str) -> bool:
    """Whether the name of a file is that of a projector."""
    file = PurePosixPath(name).name.lower()
    return file.endswith(".gguf") and _MARK.search(file) is not None


def choose(model: str, names: Collection[str]) -> str | None:
    """Return the projector among the files of a folder that belongs to the model `model`.

    In a folder with several models it has to have the model's name.
    """
    projectors = sorted(name for name in names if is_projector(name))
    others = {_base(name) for name in names if name.endswith(".gguf") and not is_projector(name)}
    own = _base(model)
    if len(others | {own}) > 1:
        projectors = [name for name in projectors if own == _base(name)]
    return min(projectors, key=_rank, default=None)


def beside(model: Path, width: int | None) -> Projector | None:
    """Return the projector in the folder of a model, if its width is that of both."""
    try:
        names = [path.name for path in model.parent.iterdir() if path.suffix == ".gguf"]
    except OSError:
        return None
    name = choose(model.name, names)
    try:
        projector = None if name is None else read(model.parent / name)
    except LoadFailed:
        return None
    return projector if projector is not None and projector.width == width else None


def read(path: Path) -> Projector:
    """Return what the header of a projector says.

    Raises:
        LoadFailed: the file is damaged, or is none.
    """
    header = read_header(path)
    if header.metadata.get("general.architecture") != "clip":
        raise LoadFailed(f"{path}: not a projector of images or audio (mmproj).")
    audio = header.metadata.get("clip.has_audio_encoder") is True
    # Older files name no encoder: they have one of images.
    vision = header.metadata.get("clip.has_vision_encoder", not audio) is True
    computed = [_computed(header, "vision", _patches(header))] if vision else []
    computed += [_SAMPLES + _computed(header, "audio", _AUDIO_PLACES)] if audio else []
    return Projector(
        path=str(path),
        size=header.size,
        width=_number(header, "vision" if vision else "audio", "projection_dim"),
        computed=max(computed, default=0),
        vision=vision,
        audio=audio,
    )


def _patches(header: GgufHeader) -> int:
    side = _number(header, "vision", "image_size") // max(
        1, _number(header, "vision", "patch_size")
    )
    return min(side * side, _LONGEST)


def _computed(header: GgufHeader, kind: str, places: int) -> int:
    """Return the bytes of the activations of an encoder of so many places."""
    inner = 8 * _number(header, kind, "embedding_length")
    inner += 2 * _number(header, kind, "feed_forward_length")
    return 4 * places * (inner + 2 * places)


def _number(header: GgufHeader, kind: str, key: str) -> int:
    values = (header.metadata.get(name) for name in (f"clip.{kind}.{key}", f"clip.{key}"))
    number = next((value for value in values if type(value) is int), 0)
    return min(max(0, number), 1 << 24)


def _base(name: str) -> str:
    """Return the name of a model without quantisation, part and mark of a projector."""
    stem = _PART.sub("", PurePosixPath(name).name.removesuffix(".gguf"))
    stem = re.sub(r"[-._]*mmproj[-._]*", "-", stem, flags=re.IGNORECASE).strip("-._")
    return _QUANTIZATION.sub("", f"-{stem}").strip("-._").lower()


def _rank(name: str) -> tuple[int, str]:
    lower = name.lower()
    ranks = (n for n, kind in enumerate(_PREFERRED) if re.search(rf"(?<![a-z]){kind}", lower))
    return next(ranks, len(_PREFERRED)), name
