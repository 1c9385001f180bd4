"""Speculation: tokens are drafted, and the model checks several of them in one step.

The answer is that of the model alone: a token of the draft that it would not have chosen is
dropped. An engine's Options derive from `SpeculationOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import msgspec
from pydantic import Field, field_validator, model_validator

from headrace.core.errors import ConfigError
from headrace.core.model import ModelFile
from headrace.engines.base import EngineOptions
from headrace.models.files import read_bounded
from headrace.models.folder import MAX_JSON
from headrace.models.gguf import read_vocabulary
from headrace.models.reference import parse
from headrace.models.store import Store
from headrace.models.transfer import Progress

Way = Literal["off", "auto", "ngram", "draft", "mtp", "eagle3"]
DRAFT_MODEL = "draft_model"
"""The option that refers to a further model, which is obtained like the model itself."""

_WITH_MODEL = ("draft", "eagle3")
# llama.cpp takes drafts with as many tokens more or less: padding, which is never written.
_PADDING = 128


class SpeculationOptions(EngineOptions):
    """Options of an engine that drafts tokens; `ways` are those that it translates.

    `of_ngrams` is how many tokens a draft by n-grams has at most by default.
    """

    ways: ClassVar[tuple[Way, ...]] = ("off", "auto", "ngram", "draft")
    of_ngrams: ClassVar[int] = 16

    speculation: Way = Field(
        "off",
        description="How tokens are drafted, which the model checks several at a time: `ngram` "
        "from the text so far, `draft` by `draft_model`, `auto` by that if it is set, else ngram.",
    )
    draft_model: str | None = Field(
        None,
        min_length=1,
        description="Reference of a small model with the same vocabulary.",
    )
    draft_tokens: int | None = Field(
        None,
        ge=1,
        le=64,
        description="The most tokens of a draft; by default, of n-grams 5 on llama.cpp, 8 on vllm "
        "and 16 on transformers; 4 of a draft model.",
    )

    @field_validator("speculation")
    @classmethod
    def _check_way(cls, way: Way) -> Way:
        if way not in cls.ways:
            raise ValueError(f"{way} is not among {', '.join(cls.ways)}")
        return way

    @field_validator("draft_model")
    @classmethod
    def _check_model(cls, reference: str | None) -> str | None:
        if reference is not None and "draft" not in cls.ways:
            raise ValueError("the engine takes none")
        return reference

    @model_validator(mode="after")
    def _check_both(self) -> Self:
        # Not by field: the configuration looks at one option at a time.
        way, reference = self.speculation, self.draft_model
        if way in _WITH_MODEL and reference is None:
            raise ValueError(f"speculation {way} needs a draft_model")
        if reference is not None and way not in ("auto", *_WITH_MODEL):
            raise ValueError(f"speculation {way} uses no draft_model")
        return self

    @property
    def way(self) -> Way:
        """How tokens are drafted; not `auto`."""
        if self.speculation != "auto":
            return self.speculation
        return "draft" if self.draft_model else "ngram"

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted."""
        return self.speculation != "off"

    @property
    def most_drafted(self) -> int:
        """The most tokens of a draft; 0 if none are drafted."""
        if not self.drafts:
            return 0
        return self.draft_tokens or (self.of_ngrams if self.way == "ngram" else 4)


def fetched(
    options: Mapping[str, Any], model: ModelFile, store: Store, progress: Progress
) -> ModelFile | None:
    """Return the file of the option `draft_model`, downloaded if needed; None without. Blocking.

    Raises:
        HeadraceError: it cannot be obtained, or as `check_draft`.
    """
    if not (reference := options.get(DRAFT_MODEL)):
        return None
    draft = store.model_file(parse(reference), progress)
    check_draft(model, draft)
    return draft


def check_draft(model: ModelFile, draft: ModelFile) -> None:
    """Check that a draft model has the vocabulary of the model. Blocking.

    Raises:
        ConfigError: it has another, or cannot draft; says in which way they differ.
    """
    problem = _difference(model, draft)
    if problem:
        raise ConfigError(
            f"The draft model {Path(draft.path).name} does not fit {Path(model.path).name}: "
            f"{problem}.",
            param=f"options.{DRAFT_MODEL}",
        )


def _difference(model: ModelFile, draft: ModelFile) -> str:
    if draft.task != "generate":
        return f"it is made to {draft.task}"
    if draft.format != model.format:
        return f"its format is {draft.format}, and that of the model {model.format}"
    if draft.tokenizer != model.tokenizer:
        return f"its tokenizer is {draft.tokenizer}, and that of the model {model.tokenizer}"
    for name in ("bos_token", "eos_token"):
        mine, its = model.special_ids.get(name), draft.special_ids.get(name)
        if mine != its:
            return f"its {name} is {its}, and that of the model {mine}"
    return _vocabularies_differ(_vocabulary(model), _vocabulary(draft))


def _vocabularies_differ(own: Sequence[Any], its: Sequence[Any]) -> str:
    if not (own and its):
        # Heads for drafts have no tokenizer of their own. The engine's library checks them.
        return ""
    if abs(len(own) - len(its)) > _PADDING:
        return f"it has {len(its)} tokens, and the model {len(own)}"
    pairs = enumerate(zip(own, its, strict=False))
    at = next((number for number, (first, second) in pairs if first != second), None)
    return "" if at is None else f"token {at} is {its[at]!r}, and in the model {own[at]!r}"


def _vocabulary(file: ModelFile) -> Sequence[Any]:
    """Return the texts of all tokens by their ids; empty where they are not known."""
    if file.format == "gguf":
        return read_vocabulary(Path(file.path))[0]
    path = Path(file.path) / "tokenizer.json"
    return _listed(path) if path.is_file() else ()


def _listed(path: Path) -> Sequence[str]:
    try:
        content = msgspec.json.decode(read_bounded(path, MAX_JSON))
        tokens = cast("Mapping[str, int]", content["model"]["vocab"])
        return sorted(tokens, key=lambda text: tokens[text])
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError, AttributeError):
        return ()
