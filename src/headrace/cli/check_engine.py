"""`headrace check-engine`: whether an engine fulfils the contract, case by case."""

from __future__ import annotations

import asyncio
import fnmatch
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import asdict

from headrace.cli import terminal
from headrace.cli.common import Common, ContextLength, Device, Options, parse_options
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.lab.cases import Case, Kind, Outcome


def check_engine(
    common: Common,
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="Name of the engine.")],
    model: Annotated[
        str, typer.Option(metavar="REF", help="A small model that it can run.", show_default=False)
    ],
    option: Options = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Kind of Backend: worker (in this process), process, pool, or all.",
        ),
    ] = "process",
    only: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only cases with such names, as 'sampling_*'.")
    ] = "*",
    task: Annotated[str | None, typer.Option(help="generate, embed or rerank.")] = None,
    device: Device = None,
    context_length: ContextLength = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
) -> None:
    """Test an engine against the contract, a line for each case; exit with 1 if one fails.

    ok: it holds. refused: the engine declares that it cannot do this, and refuses it by name.
    reported: it holds only as far as the engine declares. FAILED: it does not hold.

    Also for engines of other packages, which register a module under the entry point group
    `headrace.engines`. A small model and a context of some 512 tokens make it quick.
    """
    settings = common.settings(options=parse_options(option))
    given = {
        "engine": engine,
        "device": device,
        "context_length": context_length,
        "max_running": max_running,
        "task": task,
    }
    spec = settings.model_spec(model, {k: v for k, v in given.items() if v is not None})
    outcomes = asyncio.run(_examined(spec, settings, engine, _kinds(backend), only, common))
    if common.as_json:
        terminal.print_json([{"backend": kind, **asdict(outcome)} for kind, outcome in outcomes])
    else:
        print(_summary([outcome for _, outcome in outcomes]))
    if any(outcome.result == "failed" for _, outcome in outcomes):
        raise typer.Exit(1)


def _kinds(backend: str) -> tuple[Kind, ...]:
    from headrace.lab.cases import KINDS

    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if backend in (kind, "all"))
    if not kinds:
        raise ConfigError(f"--backend: {backend} is none of {', '.join((*KINDS, 'all'))}.")
    return kinds


async def _examined(
    spec: ModelSpec,
    settings: Settings,
    engine: str,
    kinds: tuple[Kind, ...],
    only: str,
    common: Common,
) -> list[tuple[Kind, Outcome]]:
    from headrace.lab.cases import CASES, concerns, examine, opened

    outcomes: list[tuple[Kind, Outcome]] = []
    for kind in kinds:
        async with opened(engine, spec, settings, kind) as subject:
            for case in _chosen(CASES, only):
                if concerns(case, subject):
                    outcomes.append((kind, await examine(case, subject)))
                    if not common.as_json:
                        print(_line(*outcomes[-1]), flush=True)
    return outcomes


def _chosen(cases: tuple[Case, ...], only: str) -> list[Case]:
    chosen = [case for case in cases if fnmatch.fnmatch(case.name, only)]
    if not chosen:
        raise ConfigError(f"--only: no case is called {only}.")
    return chosen


def _line(kind: Kind, outcome: Outcome) -> str:
    result = "FAILED" if outcome.result == "failed" else outcome.result
    why = f"  {outcome.why}" if outcome.why else ""
    text = f"{kind:<8} {result:<9} {outcome.case:<28} {outcome.rows:<12}"
    return terminal.printable(f"{text} {outcome.seconds:6.1f} s{why}")


def _summary(outcomes: list[Outcome]) -> str:
    results = [outcome.result for outcome in outcomes]
    counts = (f"{results.count(kind)} {kind}" for kind in ("ok", "refused", "reported", "failed"))
    return f"{len(results)} cases: {', '.join(counts)}"
