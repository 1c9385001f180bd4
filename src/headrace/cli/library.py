"""`headrace library` and `search`: well-known open models, and which of them fit this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import typer

from headrace.cli import terminal
from headrace.cli.common import Common
from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.model import Task

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.status import Plan
    from headrace.models.library import LibraryModel

_HEADS = ("NAME", "SIZE", "NEEDS", "FITS", "TOKENS/S", "CONTEXT", "ABILITIES", "LICENSE", "ABOUT")
_TOKENS = 1000  # of prompt and answer, for the guess of a speed


class Entry(NamedTuple):
    """A model with its plan for this machine; `speed` is a guess of tokens/s, from its bytes."""

    model: LibraryModel
    plan: Plan
    speed: float | None


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
    chosen = [
        model
        for model in models.current()
        if model.matches(text or ()) and task in (None, model.task)
    ]
    _show(common, settings, chosen, fits=fits)


def search(
    common: Common,
    text: Annotated[list[str], typer.Argument(metavar="TEXT", help="Words that must all occur.")],
) -> None:
    """Search the library by name, ability, license and description."""
    from headrace.models import library as models

    settings = common.settings()
    chosen = [model for model in models.current() if model.matches(text)]
    if not chosen:
        raise UnknownModel(
            f"The library has no model with {' and '.join(text)}; `headrace library` lists all. "
            "Any repository on the hub can be pulled as hub:org/repo."
        )
    _show(common, settings, chosen, fits=False)


def _show(
    common: Common, settings: Settings, models: Sequence[LibraryModel], *, fits: bool
) -> None:
    entries = [entry for entry in _entries(settings, models) if entry.plan.fits or not fits]
    if not entries:
        raise InvalidRequest("No model of the library fits; `headrace library` lists all.")
    common.show([_plain(entry) for entry in entries], _lines(entries))


def _entries(settings: Settings, models: Sequence[LibraryModel]) -> list[Entry]:
    from headrace import runtime
    from headrace.lab import limits

    rate = limits.bandwidth(settings.config.home)
    plans = asyncio.run(runtime.library_plans(settings, models))
    return [
        Entry(model, plan, _speed(model, plan, rate))
        for model, plan in zip(models, plans, strict=True)
    ]


def _speed(model: LibraryModel, plan: Plan, rate: float) -> float | None:
    """Return the most tokens/s of one stream on the CPU; the rate of a GPU is not measured."""
    from headrace.lab import limits

    if model.task != "generate" or set(plan.need.devices) != {"cpu"} or not plan.fits:
        return None
    read = model.size * model.active // model.parameters
    return limits.limit(msgspec.structs.replace(model.file, size=read), 1, _TOKENS, rate)


def _plain(entry: Entry) -> dict[str, Any]:
    plan = entry.plan
    return {
        **msgspec.to_builtins(entry.model),
        "needs": plan.need.devices,
        "fits": plan.fits,
        "largest_context": plan.largest_context,
        "tokens_per_second": entry.speed,
    }


def _lines(entries: Sequence[Entry]) -> Iterator[str]:
    rows = [
        (
            entry.model.name,
            terminal.size(entry.model.size),
            terminal.size(sum(entry.plan.need.devices.values())),
            "yes" if entry.plan.fits else "no",
            None if entry.speed is None else f"~{entry.speed:.2g}",
            str(entry.model.context_length),
            ", ".join(entry.model.abilities) or None,
            entry.model.license,
            entry.model.about,
        )
        for entry in entries
    ]
    yield from terminal.aligned(_HEADS, rows, {"SIZE", "NEEDS", "TOKENS/S", "CONTEXT"})
    yield ""
    yield "SIZE and NEEDS are estimates; TOKENS/S is a guess for one stream. `headrace pull NAME`"
    yield "downloads a model; NAME-q8_0 is one of its other quantizations (--json lists them)."
    if unchecked := sum(entry.model.checked is None for entry in entries):
        yield f"{unchecked} of {len(entries)} entries were never compared with the hub."
