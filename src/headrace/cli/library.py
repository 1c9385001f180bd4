"""`headrace library` and `search`: well-known open models, and which of them fit this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli import terminal
from headrace.cli.common import Common
from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.model import Task

if TYPE_CHECKING:
    from headrace.config import Settings

_HEADS = ("NAME", "SIZE", "NEEDS", "FITS", "TOKENS/S", "CONTEXT", "ABILITIES", "LICENSE", "ABOUT")


def library(
    common: Common,
    text: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Words that must all occur.")
    ] = None,
    fits: Annotated[bool, typer.Option("--fits/--all", help="Only what fits here.")] = False,
    task: Annotated[
        Task | None, typer.Option(metavar="TASK", help="generate, embed or rerank.")
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Download a newer list from here first and keep it."),
    ] = None,
) -> None:
    """List well-known open models, and which of them fit this machine.

    What a model needs is the estimate of `headrace plan`; its speed is a guess from the bytes that
    are read for a token and the measured rate of the memory.
    """
    from headrace.models import library as models

    settings = common.settings()
    if update is not None:
        models.update(update, settings.config.home)
    entries = _entries(settings, LibraryFilter(q=" ".join(text or ()), task=task, fits=fits))
    if not entries:
        verb = "fits" if fits else "matches"
        raise InvalidRequest(f"No model of the library {verb}; `headrace library` lists all.")
    common.show(entries, _lines(entries))


def search(
    common: Common,
    text: Annotated[list[str], typer.Argument(metavar="TEXT", help="Words that must all occur.")],
) -> None:
    """Search the library by name, ability, license and description."""
    entries = _entries(common.settings(), LibraryFilter(q=" ".join(text)))
    if not entries:
        raise UnknownModel(
            f"The library has no model with {' and '.join(text)}; `headrace library` lists all. "
            "Any repository on the hub can be pulled as hub:org/repo."
        )
    common.show(entries, _lines(entries))


def _entries(settings: Settings, wanted: LibraryFilter) -> list[LibraryEntry]:
    from headrace import roofline, runtime
    from headrace.listing import list_library

    loader = runtime.open_pool(settings, []).loader
    home = settings.config.home
    return asyncio.run(list_library(loader, home, settings.model_spec, wanted, roofline.bandwidth))


def _guess(speed: float | None) -> str | None:
    """Return a guess with two digits that count."""
    return None if speed is None else f"~{float(f'{speed:.2g}'):g}"


def _lines(entries: Sequence[LibraryEntry]) -> Iterator[str]:
    rows = [
        (
            entry.name,
            terminal.size(entry.size),
            terminal.size(sum(entry.needs.values())),
            "yes" if entry.fits else "no",
            _guess(entry.tokens_per_second),
            str(entry.context_length),
            ", ".join(entry.abilities) or None,
            entry.license,
            entry.about,
        )
        for entry in entries
    ]
    yield from terminal.aligned(_HEADS, rows, {"SIZE", "NEEDS", "TOKENS/S", "CONTEXT"})
    yield ""
    yield "SIZE and NEEDS are estimates; TOKENS/S is a guess for one stream. `headrace pull NAME`"
    yield "downloads a model; NAME-q8_0 is one of its other quantizations (--json lists them)."
    if unchecked := sum(entry.checked is None for entry in entries):
        yield f"{unchecked} of {len(entries)} entries were never compared with the hub."
