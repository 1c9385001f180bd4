"""The commands that change a running service: its models, by name, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from headrace.cli import terminal
from headrace.cli.common import Common, ModelArgument, parse_options
from headrace.cli.ps import DEVICE_HEADS, Url, amounts, devices, span
from headrace.cli.run import Options
from headrace.core.errors import HeadraceError, UpstreamError
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus

if TYPE_CHECKING:
    from headrace.cli.client import Client

T = TypeVar("T")

_POLL_S = 0.3

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Setting of the model, as keep_alive=5m."),
]


def start(
    common: Common,
    model: ModelArgument,
    option: Options = None,
    changes: Changes = None,
    url: Url = None,
) -> None:
    """Load a model and wait for it; a failed one gets another chance, an unknown one is added."""
    options = {f"options.{key}": value for key, value in _settings(option, "flag -o").items()}
    settings = options | _settings(changes, "flag --set")
    _order(common, url, "load", model, settings=settings or None)


def stop(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Unload a model when its answers have ended, and wait until the memory is back."""
    _order(common, url, "unload", model)


def restart(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Unload a model and load it again."""
    _order(common, url, "restart", model)


def pin(
    common: Common,
    model: ModelArgument,
    off: Annotated[bool, typer.Option("--off", help="Let it go when others need room.")] = False,
    url: Url = None,
) -> None:
    """Keep a model loaded, whatever else needs its memory."""
    _order(common, url, "pin", model, pinned=not off)


def update(
    common: Common,
    model: ModelArgument,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Such as keep_alive=5m, enabled=false, options.threads=4; "
            "`KEY=` is again as configured.",
        ),
    ],
    url: Url = None,
) -> None:
    """Change settings of a model while it serves; it is kept over a restart of the service."""
    _order(common, url, "update", model, settings=_settings(changes, "argument"))


def reload(common: Common, url: Url = None) -> None:
    """Let the service read its configuration again and apply what has changed."""
    done = _ask(common, url, lambda client: client.reload())
    if common.as_json:
        terminal.print_json(done)
        return
    said: dict[str, tuple[str, ...]] = msgspec.structs.asdict(done)
    rows = [(what.replace("_", " "), ", ".join(names)) for what, names in said.items() if names]
    terminal.columns((), rows or [("nothing has changed",)])


def events(common: Common, url: Url = None) -> None:
    """Follow what happens to the models, until Ctrl-C."""

    def show(event: PoolEvent) -> None:
        line = msgspec.json.encode(event).decode() if common.as_json else written(event)
        print(line, flush=True)

    _ask(common, url, lambda client: client.follow(show))
    terminal.note("The service has ended.")


def plan(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Tell what loading a model would need, whether it fits, and what would have to go.

    A running service is asked; without one it is told for this machine as it is.
    """
    found = _planned(common, model, url)
    if common.as_json:
        terminal.print_json(found)
    else:
        _print_plan(found)
    if not found.fits:
        raise typer.Exit(1)


def written(event: PoolEvent) -> str:
    """Return an event in one line."""
    clock = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S")
    name = f"{event.model} #{event.replica}" if event.replica else event.model
    more = [f"{key}={_short(value)}" for key, value in event.data.items()]
    return terminal.printable("  ".join(part for part in (clock, event.kind, name, *more) if part))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _settings(pairs: list[str] | None, where: str) -> dict[str, str | None]:
    """Read what is to be set; without a value, it is again as the configuration has it."""
    return {key: value or None for key, value in parse_options(pairs, where).items()}


def _ask(common: Common, url: str | None, work: Callable[[Client], Awaitable[T]]) -> T:
    from headrace.cli.client import ask

    return ask(common.settings(), url, work)


def _order(common: Common, url: str | None, what: str, model: str, **fields: Any) -> None:
    status = _ask(common, url, lambda client: _ordered(client, what, model, fields))
    if common.as_json:
        terminal.print_json(status)
    else:
        print(terminal.printable(", ".join(_told(status))))


def _told(status: ModelStatus) -> Iterator[str]:
    yield f"{status.id} is {status.state if status.enabled else 'disabled'}"
    yield from ("pinned",) if status.pinned else ()
    if size := amounts(status.memory):
        yield size


async def _ordered(client: Client, what: str, model: str, fields: dict[str, Any]) -> ModelStatus:
    """Give an order; while it is carried out, show on a terminal how far a load is."""
    order = asyncio.ensure_future(client.order(what, model, **fields))
    if not sys.stderr.isatty():
        return await order
    try:
        with terminal.progress() as report:
            while not (await asyncio.wait({order}, timeout=_POLL_S))[0]:
                with contextlib.suppress(HeadraceError):
                    _report(await client.status(), model, report)
        return order.result()
    finally:
        order.cancel()


def _report(status: PoolStatus, model: str, report: terminal.Report) -> None:
    for one in status.models:
        if one.progress and model in (one.id, one.source, *one.aliases):
            report(one.progress, one.done, one.total)


def _planned(common: Common, model: str, url: str | None) -> Plan:
    from headrace import runtime

    try:
        return _ask(common, url, lambda client: client.plan(model))
    except UpstreamError as error:
        if error.param != "url" or url or os.environ.get("HEADRACE_URL"):
            raise
    settings = common.settings()
    return asyncio.run(runtime.plan(settings, settings.model_spec(model)))


def _print_plan(found: Plan) -> None:
    need = found.need
    parts = ", ".join(f"{name} {terminal.size(size)}" for name, size in need.parts.items())
    facts = {
        "model": found.model,
        "engine": found.engine,
        "needs": amounts(need.devices),
        "of that": parts,
        "known": need.how,
        "for": _measure(need.context_length, need.max_running),
        "loads in": None if need.load_s is None else span(need.load_s),
        "fits": _verdict(found),
        "largest context": found.largest_context,
        "why": found.reason,
    }
    terminal.columns((), [(name, fact) for name, fact in facts.items() if fact not in (None, "")])
    if found.devices:
        print()
        terminal.columns(DEVICE_HEADS, devices(found.devices))


def _measure(context: int | None, running: int | None) -> str | None:
    said = (
        f"{context} tokens of context" if context else "",
        f"{running} at once" if running else "",
    )
    return ", ".join(part for part in said if part) or None


def _verdict(found: Plan) -> str:
    if found.loaded:
        return "it is loaded"
    if found.fits and found.evict:
        return f"yes, when these go: {', '.join(found.evict)}"
    return "yes" if found.fits else "no"
