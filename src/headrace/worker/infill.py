"""Fill in the middle: the prompt of a gap between a prefix and a suffix.

Models that were trained for it have three tokens: before the prefix, before the suffix, and where
the gap begins. A file can name them; otherwise a vocabulary shows them by their texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headrace.core.errors import InvalidRequest
from headrace.engines.abilities import PlainText
from headrace.engines.base import Engine

_SPACE, _BAR = "\u2581", "\uff5c"


class Markers(NamedTuple):
    """The texts of a family's tokens; most have the prefix first."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False


FAMILIES = (
    Markers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    Markers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    Markers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    Markers(
        f"<{_BAR}fim{_SPACE}begin{_BAR}>",
        f"<{_BAR}fim{_SPACE}hole{_BAR}>",
        f"<{_BAR}fim{_SPACE}end{_BAR}>",
    ),
    Markers(f"{_SPACE}<PRE>", f"{_SPACE}<SUF>", f"{_SPACE}<MID>"),
    Markers("<PRE>", "<SUF>", "<MID>"),
    Markers("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    Markers("<|prefix|>", "<|suffix|>", "<|middle|>"),
    Markers("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
    Markers("[PREFIX]", "[SUFFIX]", suffix_first=True),
)
"""Qwen and CodeGemma, StarCoder and Granite, SantaCoder, DeepSeek, Code Llama (two ways), GLM,
others; Seed-Coder, Codestral."""
ENDS = (
    *("<|endoftext|>", "<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<|file_sep|>", "<file_sep>"),
    *("<|file_separator|>", f"{_SPACE}<EOT>", "<EOT>"),
)
"""What ends the text of a gap, beside the model's own end token."""


class FileTokens(NamedTuple):
    """The tokens before the name of a project, and before the name of each of its files."""

    project: int
    file: int


_FILES = (
    ("<|repo_name|>", "<|file_sep|>"), ("<repo_name>", "<file_sep>"), ("<reponame>", "<filename>"),
)  # fmt: skip


class Infill(NamedTuple):
    """The tokens of a loaded model. `ends` end an answer; `names` are the texts of all of them.

    `files` are those before parts of other files, if it was trained with them.
    """

    engine: PlainText
    opening: tuple[int, ...]
    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool
    ends: tuple[int, ...]
    names: tuple[str, ...]
    files: FileTokens | None = None

    def prompt(
        self,
        prefix: Iterable[int],
        suffix: Iterable[int],
        *,
        begun: Iterable[int] = (),
        others: Iterable[int] = (),
    ) -> tuple[int, ...]:
        """Return the prompt of token ids of both sides.

        `begun` is the beginning of the gap's text, `others` are parts of other files.
        """
        first, second = (self.prefix, *prefix), (self.suffix, *suffix)
        sides = (*second, *first) if self.suffix_first else (*first, *second)
        middle = () if self.middle is None else (self.middle,)
        return (*self.opening, *others, *sides, *middle, *begun)

    def check(self, token_ids: Iterable[int], param: str) -> None:
        """Refuse a text that has become one of the tokens itself.

        Raises:
            InvalidRequest: it has; the sides of the gap would be others.
        """
        own = {self.prefix, self.suffix, self.middle, *(self.files or ())}
        if not own.isdisjoint(token_ids):
            raise InvalidRequest("A side of the gap has a token that marks one.", param=param)


def infill_of(engine: Engine, declared: Sequence[int] = ()) -> Infill | None:
    """Return how a model fills gaps; None if it has no tokens for that.

    `declared` are the ids that the model's file names. Blocking.
    """
    if not isinstance(engine, PlainText):
        return None
    markers, ids = _declared(engine, declared) or _by_text(engine) or (None, [])
    if markers is None:
        return None
    ends = [token for name in ENDS if (token := _token(engine, name)) is not None]
    files = _file_tokens(engine)
    texts = (engine.detokenize((token,)) for token in (*ids, *ends, *(files or ())))
    return Infill(
        engine=engine,
        opening=_opening(engine),
        prefix=ids[0],
        suffix=ids[1],
        middle=ids[2] if len(ids) > 2 else None,
        suffix_first=markers.suffix_first,
        ends=(*ids, *(token for token in ends if token not in ids)),
        names=tuple(name for text in texts if (name := text.strip(f" {_SPACE}"))),
        files=files,
    )


def _file_tokens(engine: Engine) -> FileTokens | None:
    for names in _FILES:
        project, file = (_token(engine, name) for name in names)
        if project is not None and file is not None:
            return FileTokens(project, file)
    return None


def _declared(engine: Engine, ids: Sequence[int]) -> tuple[Markers, list[int]] | None:
    """Return the tokens that the file names; those of a family have its order."""
    if len(ids) < 2:
        return None
    texts = [engine.detokenize((token,)) for token in ids]
    family = next((family for family in FAMILIES if _is_text(texts[0], family.prefix)), None)
    return family or Markers(texts[0], texts[1]), list(ids)


def _by_text(engine: Engine) -> tuple[Markers, list[int]] | None:
    for family in FAMILIES:
        tokens = [_token(engine, name) for name in family[:3] if name]
        ids = [token for token in tokens if token is not None]
        if len(ids) == len(tokens):
            return family, ids
    return None


def _token(engine: Engine, name: str) -> int | None:
    """Return the token that a text is in this vocabulary; None if it is none or several."""
    ids = engine.tokenize(name, add_special=False)
    # A tokenizer may have one token for any word that it does not know.
    return ids[0] if len(ids) == 1 and _is_text(engine.detokenize(ids), name) else None


def _is_text(text: str, name: str) -> bool:
    return text.strip(f" {_SPACE}") == name.strip(_SPACE)


def _opening(engine: Engine) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before any text."""
    plain = list(engine.tokenize("a", add_special=False))
    full = list(engine.tokenize("a", add_special=True))
    size = len(plain)
    places = (n for n in range(len(full)) if full[n : n + size] == plain)
    return tuple(full[: next(places, 0)])
