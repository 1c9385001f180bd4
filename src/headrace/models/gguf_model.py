"""The model in a GGUF file, or in all parts of a split one, from the headers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NoReturn

from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile, Task
from headrace.models import projector
from headrace.models.files import check_facts, scaled_context
from headrace.models.gguf import GgufHeader, Skipped, read_header
from headrace.models.gguf_types import FILE_TYPES

MAX_PARTS = 1000
_POOLING_RANK = 4
EMBEDDERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures without an output layer."""
# Their tokens hold all bytes of a text. Others drop accents, or have one token for any word.
_LOSSLESS = frozenset({"gpt2", "llama"})
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Names in templates, and those of the keys of ids: `seperator` is how GGUF spells it."""
_INFILL = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


def parts(path: Path) -> list[Path]:
    """Return all files of the model that `path` belongs to, in order; most have one.

    Raises:
        LoadFailed: `path` is a part of a split model, but not its first.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["parts"])
    if int(match["part"]) != 1 or not 1 <= count <= MAX_PARTS:
        first = f"{match['stem']}-00001-of-{match['parts']}.gguf"
        raise LoadFailed(f"{path}: a part of a split model; give its first part, {first}.")
    stem = path.with_name(match["stem"])
    return [stem.with_name(f"{stem.name}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


def is_later_part(name: str) -> bool:
    """Whether this is a part of a split model other than the first."""
    match = _PART.fullmatch(name)
    return match is not None and int(match["part"]) != 1


def describe(path: Path) -> ModelFile:
    """Check the headers of a model's files and describe the model.

    Raises:
        LoadFailed: a file is missing or damaged, or is not a language model.
    """
    headers = [_part(file) for file in parts(path)]
    facts = _Facts(headers[0])
    count = facts.whole("split.count") or 1
    if count != len(headers):
        raise LoadFailed(f"{path}: the header counts {count} parts; the names {len(headers)}.")
    parameters = sum(header.parameters for header in headers)
    beside = projector.beside(path, facts.width())
    if not parameters:
        raise LoadFailed(f"{path}: there are no weights in it.")
    cache = facts.kv_bytes_per_token()
    check_facts(path, cache, facts.architecture, facts.tokenizer())
    return ModelFile(
        path=str(path),
        format="gguf",
        task=facts.task(),
        architecture=facts.architecture,
        parameters=parameters,
        quantization=_quantization(facts, headers),
        context_length=facts.context_length(),
        chat_template=facts.chat_template(),
        tokenizer=facts.tokenizer(),
        max_token_bytes=facts.max_token_bytes(),
        special_ids=facts.special_ids(),
        infill_ids=facts.infill_ids(),
        size=sum(header.size for header in headers),
        layers=facts.whole(f"{facts.architecture}.block_count") or 0,
        vocabulary=facts.vocabulary(),
        kv_bytes_per_token=cache,
        projector=None if beside is None else beside.path,
        vision=beside is not None and beside.vision,
        audio=beside is not None and beside.audio,
    )


def _part(path: Path) -> GgufHeader:
    if not path.exists():
        raise LoadFailed(f"{path}: this part of the model is missing.")
    return read_header(path)


def _quantization(facts: _Facts, headers: list[GgufHeader]) -> str | None:
    named = FILE_TYPES.get((facts.whole("general.file_type", zero=True) or 0) % 1024)
    if named is not None and "general.file_type" in facts.metadata:
        return named
    sizes: Counter[str] = Counter()
    for header in headers:
        sizes.update(header.tensor_bytes)
    return max(sizes, key=lambda name: sizes[name])


class _Facts:
    """The metadata of one header by name and type."""

    def __init__(self, header: GgufHeader) -> None:
        self.metadata = header.metadata
        self._path = header.path
        architecture = self.text("general.architecture")
        kind = self.text("general.type") or "model"
        if architecture is None:
            self._fail("general.architecture is missing")
        if kind != "model" or architecture == "clip":
            self._fail(f"it is no language model but: {kind}, {architecture}"[:120])
        self.architecture: str = architecture

    def _fail(self, reason: str) -> NoReturn:
        raise LoadFailed(f"{self._path}: {reason}.")

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            self._fail(f"{key} is no text, or too long")
        return value

    def number(self, key: str) -> float | None:
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self._fail(f"{key} is no number")
        return value

    def whole(self, key: str, *, zero: bool = False) -> int | None:
        """Return a whole number; one that makes no sense as a count is refused."""
        value = self.number(key)
        if value is None or (value == 0 and not zero):
            return None
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            self._fail(f"{key} is {value}, which is impossible")
        return value

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def context_length(self) -> int | None:
        return scaled_context(
            self.number(self._key("context_length")),
            kind=self.text(self._key("rope.scaling.type")),
            factor=self.number(self._key("rope.scaling.factor")),
            original=self.number(self._key("rope.scaling.original_context_length")),
            architecture=self.architecture,
        )

    def width(self) -> int | None:
        """Return the length of an embedding."""
        return self.whole(self._key("embedding_length"))

    def chat_template(self) -> str | None:
        """Return the template, unless it is no text or longer than a template can be."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    def tokenizer(self) -> str | None:
        """Return the kind of the tokenizer: `gpt2` is BPE, `llama` SentencePiece."""
        value = self.metadata.get("tokenizer.ggml.model")
        return value if isinstance(value, str) else None

    def max_token_bytes(self) -> int | None:
        """Return how many bytes of text one token can stand for, None if without a limit."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if self.tokenizer() not in _LOSSLESS:
            return None
        return (tokens.longest or None) if isinstance(tokens, Skipped) else None

    def vocabulary(self) -> int:
        """Return how many tokens there are, 0 if none are listed."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, Skipped) else 0

    def special_ids(self) -> dict[str, int]:
        """Return the ids of special tokens by their names in templates; only those that it has."""
        ids = {
            name: self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in _SPECIAL.items()
        }
        # Some files have -1, or its bits, for a token that they do not have.
        return {name: n for name, n in ids.items() if type(n) is int and 0 <= n < 1 << 31}

    def infill_ids(self) -> tuple[int, ...]:
        """Return the tokens before a prefix, a suffix and a gap; without the last if it has none.

        Older files have other names for them.
        """
        ids: list[int] = []
        for names in _INFILL:
            keys = (f"tokenizer.ggml.{name}_token_id" for name in names)
            values = (value for key in keys if type(value := self.metadata.get(key)) is int)
            if (token := next(values, -1)) in range(1 << 31):
                ids.append(token)
            elif len(ids) < 2:
                return ()
        return tuple(ids)

    def task(self) -> Task:
        """Return the task: a model that pools its tokens does not generate."""
        pooling = self.whole(self._key("pooling_type"), zero=True) or 0
        if pooling == _POOLING_RANK:
            return "rerank"
        return "embed" if pooling or self.architecture in EMBEDDERS else "generate"

    def _heads(self, key: str, layers: int) -> int | None:
        """Return the heads of all layers together; the value may be one for each layer."""
        value = self.metadata.get(self._key(key))
        if not isinstance(value, tuple):
            heads = self.whole(self._key(key))
            return None if heads is None else heads * layers
        if len(value) != layers or not all(isinstance(n, int) and 0 <= n < 1 << 20 for n in value):
            self._fail(f"{self._key(key)} does not fit {layers} layers")
        return int(sum(value))

    def kv_bytes_per_token(self) -> int | None:
        """Return layers * heads * (key + value length) * 2 bytes, or None if one is missing."""
        layers = self.whole(self._key("block_count"))
        if layers is None:
            return None
        heads = self._heads("attention.head_count", layers)
        stored = self._heads("attention.head_count_kv", layers) or heads
        width = self.whole(self._key("embedding_length"))
        default = width * layers // heads if width and heads else None
        key = self.whole(self._key("attention.key_length")) or default
        value = self.whole(self._key("attention.value_length")) or default
        if stored is None or key is None or value is None:
            return None
        return stored * (key + value) * 2
