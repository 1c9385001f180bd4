"""Well-known models, and what each would need on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Annotated

import msgspec
from msgspec import Meta

from headrace.core.model import ModelFile, Task

_MAX_QUERY = 512


class LibraryModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the library in one quantization.

    `size` is that of its file in bytes, computed; `active` counts the parameters that are read for
    a token. `checked` is the day on which the hub was compared, None if it never was.
    """

    name: str
    family: str
    title: str
    about: str
    reference: str
    quantization: str
    quantizations: tuple[str, ...]
    parameters: int
    active: int
    size: int
    context_length: int
    layers: int
    vocabulary: int
    kv_bytes_per_token: int
    license: str
    abilities: tuple[str, ...] = ()
    task: Task = "generate"
    checked: date | None = None

    @property
    def file(self) -> ModelFile:
        """Return what its file will be, as far as an estimate needs it."""
        return ModelFile(
            path="",
            format="gguf",
            task=self.task,
            parameters=self.parameters,
            quantization=self.quantization,
            context_length=self.context_length,
            size=self.size,
            layers=self.layers,
            vocabulary=self.vocabulary,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )

    def matches(self, words: Sequence[str]) -> bool:
        """Whether each word is in its name, its description, its abilities or its license."""
        texts = (self.name, self.title, self.about, self.license, self.task, *self.abilities)
        text = " ".join(texts).lower()
        return all(word.lower() in text for word in words)


class LibraryEntry(LibraryModel, frozen=True, kw_only=True):
    """A model of the library with its plan for this machine.

    `needs` is an estimate, in bytes by device, and `fits` whether it can be loaded with the context
    that it would get here; `reason` explains that. `largest_context` is the most tokens that would
    fit, None if unknown. `tokens_per_second` is a guess for one stream on the CPU, from the rate of
    the memory and the bytes that a token needs; None where there is none. `stored` is whether it
    was downloaded.
    """

    needs: dict[str, int]
    fits: bool
    reason: str = ""
    largest_context: int | None = None
    tokens_per_second: float | None = None
    stored: bool = False


class LibraryFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A filter of models: `q` has words that must all occur; `fits` keeps what fits here."""

    q: Annotated[str, Meta(max_length=_MAX_QUERY)] = ""
    task: Task | None = None
    fits: bool = False
