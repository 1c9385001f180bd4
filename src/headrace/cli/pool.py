"""Commands on the models of a running service: `ps`, `plan`, `events`, `start`, `stop`, ..."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from typer import Argument, Option

from headrace import log
from headrace.cli import terminal
from headrace.cli.common import Common, ModelArgument, Options, Url, parse_options
from headrace.core.errors import HeadraceError, UpstreamError
from headrace.core.status import (
    DeviceStatus,
    ModelStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    ReplicaStatus,
)
from headrace.core.values import amounts

if TYPE_CHECKING:
    from headrace.cli.client import Client

# States of a model without a process.
_EMPTY = {"created", "stopped"}
_EVERY_S = 1.0
_POLL_S = 0.3
_LONGEST_ERROR = 60
_MODEL_HEADS = (
    "NAME",
    "STATE",
    "ENGINE",
    "MEMORY",
    "RUNNING",
    "QUEUED",
    "UNLOADS",
    "RESTARTS",
    "ERROR",
)
_DEVICE_HEADS = ("DEVICE", "BUDGET", "BOOKED", "FREE")
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"

Changes = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Setting of the model, as keep_alive=5m."),
]


def ps(
    common: Common,
    watch: Annotated[
        bool, Option("--watch", "-w", help="Refresh each second, until Ctrl-C.")
    ] = False,
    url: Url = None,
) -> None:
    """List the models of a running service: state, memory, queue; and its devices.

    With -v also why each model runs on its engine.
    """
    common.ask(url, lambda client: _watch(client, common, again=watch))


def start(
    common: Common,
    model: ModelArgument,
    option: Options = None,
    changes: Changes = None,
    url: Url = None,
) -> None:
    """Load a model and wait for it; a failed one is loaded again, an unknown one is added."""
    options = {f"options.{key}": value for key, value in _settings(option, "flag -o").items()}
    settings = options | _settings(changes, "flag --set")
    _order(common, url, "load", model, settings=settings or None)


def stop(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Unload a model when its answers have ended, and wait until the memory is free."""
    _order(common, url, "unload", model)


def restart(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Unload a model and load it again."""
    _order(common, url, "restart", model)


def pin(
    common: Common,
    model: ModelArgument,
    off: Annotated[bool, Option("--off", help="Unpin it: it may be evicted.")] = False,
    url: Url = None,
) -> None:
    """Pin a model, so that it is never evicted."""
    _order(common, url, "pin", model, pinned=not off)


def update(
    common: Common,
    model: ModelArgument,
    changes: Annotated[
        list[str],
        Argument(
            metavar="KEY=VALUE",
            help="Such as keep_alive=5m, enabled=false, options.threads=4, adapters.NAME=PATH; "
            "`KEY=` restores the configured value.",
        ),
    ],
    url: Url = None,
) -> None:
    """Change settings of a model while it serves; they survive a restart of the service."""
    _order(common, url, "update", model, settings=_settings(changes, "argument"))


def reload(common: Common, url: Url = None) -> None:
    """Let the service read its configuration again and apply what has changed."""
    reloaded = common.ask(url, lambda client: client.reload())
    changes: dict[str, tuple[str, ...]] = msgspec.structs.asdict(reloaded)
    rows = [(kind.replace("_", " "), ", ".join(names)) for kind, names in changes.items() if names]
    common.show(reloaded, terminal.aligned((), rows or [("nothing has changed",)]))


def events(common: Common, url: Url = None) -> None:
    """Print the events of the models, until Ctrl-C."""

    async def follow(client: Client) -> None:
        async with contextlib.aclosing(client.events()) as stream:
            async for event in stream:
                as_json = msgspec.json.encode(event).decode()
                print(as_json if common.as_json else _event_line(event), flush=True)

    common.ask(url, follow)
    terminal.note("The service has ended.")


def plan(common: Common, model: ModelArgument, url: Url = None) -> None:
    """Show what loading a model would need, whether it fits, and what would be evicted.

    It is the plan of a running service; without one, that for this machine as it is.
    """
    planned = _planned(common, model, url)
    common.show(planned, _plan_lines(planned))
    if not planned.fits:
        raise typer.Exit(1)


async def _watch(client: Client, common: Common, *, again: bool) -> None:
    while True:
        status = await client.status()
        if common.as_json and again:
            print(msgspec.json.encode(status).decode(), flush=True)
        elif common.as_json:
            terminal.print_json(status)
        else:
            text = status_text(status, time.time(), reasons=bool(common.verbose))
            _print(text, in_place=again and sys.stdout.isatty())
        if not again:
            return
        await asyncio.sleep(_EVERY_S)


def _print(text: str, *, in_place: bool) -> None:
    """Print a table; in place each line is overwritten, to avoid flicker."""
    if in_place:
        text = _HOME + text.replace("\n", f"{_END_OF_LINE}\n") + _REST
    sys.stdout.write(text)
    sys.stdout.flush()


def status_text(status: PoolStatus, now: float, *, reasons: bool = False) -> str:
    """Return both tables as text, and why each engine was chosen; `now` is Unix time."""
    rows = [row for model in status.models for row in _rows(model, now)]
    models = terminal.aligned(_MODEL_HEADS, rows)
    why = [f"{model.id}: {model.engine_reason}" for model in status.models if model.engine_reason]
    last = ("", *map(terminal.printable, why)) if reasons and why else ()
    return "".join(f"{line}\n" for line in (*models, "", *_device_lines(status.devices), *last))


def _device_lines(devices: Sequence[DeviceStatus]) -> Iterator[str]:
    sizes = ((device.name, (device.budget, device.booked, device.free)) for device in devices)
    rows = [(name, *map(terminal.size, amounts)) for name, amounts in sizes]
    return terminal.aligned(_DEVICE_HEADS, rows)


def _rows(model: ModelStatus, now: float) -> Iterator[tuple[str | None, ...]]:
    reason = model.replicas[0].reason if len(model.replicas) == 1 else None
    error = " ".join((model.last_error or reason or "").split())[:_LONGEST_ERROR]
    estimated = amounts(model.estimated.devices) if model.estimated else None
    yield (
        model.id,
        state(model, stage=True),
        model.engine or None,
        amounts(model.memory) or (estimated and f"~{estimated}"),
        requests_of(model),
        f"{model.queued}/{model.max_queued}",
        _until(model, now),
        str(model.restarts),
        error or None,
    )
    if len(model.replicas) > 1 or any(replica.node for replica in model.replicas):
        yield from map(_replica, model.replicas)


def _replica(replica: ReplicaStatus) -> tuple[str | None, ...]:
    node = f"{replica.node} " if replica.node else ""
    name, memory = f"  {node}#{replica.number}", amounts(replica.memory)
    return name, replica.state, None, memory, str(replica.running), *[None] * 3, replica.reason


def state(model: ModelStatus, *, stage: bool = False) -> str:
    """Return the state of a model, with the share of a load that is done, and its stage."""
    if not model.enabled:
        return "disabled"
    if model.state in _EMPTY:
        return "not loaded"
    share = f" {100 * model.done // model.total}%" if model.progress and model.total else ""
    if stage and model.progress and model.progress != model.state:
        return f"{model.state} ({model.progress}{share})"
    pause = " (drafts off)" if any(each.drafting is False for each in model.replicas) else ""
    return f"{model.state}{share}{pause}"


def requests_of(model: ModelStatus) -> str:
    """Return the running requests of a model, and how many can run: `2/8`."""
    return f"{model.running}/{model.max_running or '-'}"


def _until(model: ModelStatus, now: float) -> str | None:
    if model.pinned:
        return "pinned"
    if model.state == "failed":
        left_s = 0.0 if model.retry_at is None else model.retry_at - now
        return f"retry in {terminal.span(left_s)}" if left_s > 0 else "next request"
    if model.state != "ready":
        return None
    return "never" if model.until is None else f"in {terminal.span(model.until - now)}"


def _event_line(event: PoolEvent) -> str:
    clock = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S")
    name = f"{event.model} #{event.replica}" if event.replica > 1 else event.model
    sentence = log.sentence(f"pool.{event.kind}", {"model": name, **event.data})
    return f"{clock} {terminal.flat(sentence or f'{name} {event.kind}')}"


def _settings(pairs: list[str] | None, where: str) -> dict[str, str | None]:
    """Read settings; one without a value gets the configured one."""
    return {key: value or None for key, value in parse_options(pairs, where).items()}


def _order(common: Common, url: str | None, action: str, model: str, **fields: Any) -> None:
    status = common.ask(url, lambda client: _ordered(client, action, model, fields))
    first = f"{status.id} is {status.state if status.enabled else 'disabled'}"
    parts = (first, "pinned" if status.pinned else None, amounts(status.memory))
    common.show(status, [terminal.printable(", ".join(part for part in parts if part))])


async def _ordered(client: Client, action: str, model: str, fields: dict[str, Any]) -> ModelStatus:
    """Send an order; on a terminal, show the progress of a load meanwhile."""
    order = asyncio.ensure_future(client.order(action, model, **fields))
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


def _report(status: PoolStatus, name: str, report: terminal.Report) -> None:
    for model in status.models:
        if model.progress and name in (model.id, model.source, *model.aliases):
            report(model.progress, model.done, model.total)


def _planned(common: Common, model: str, url: str | None) -> Plan:
    from headrace import runtime

    try:
        return common.ask(url, lambda client: client.plan(model))
    except UpstreamError as error:
        if error.param != "url" or url or os.environ.get("HEADRACE_URL"):
            raise
    settings = common.settings()
    return asyncio.run(runtime.plan(settings, settings.model_spec(model)))


def _plan_lines(plan: Plan) -> Iterator[str]:
    need = plan.need
    tokens = f"{need.context_length} tokens of context" if need.context_length else None
    running = f"{need.max_running} requests at once" if need.max_running else None
    facts = {
        "model": plan.model,
        "engine": plan.engine,
        "needs": f"{amounts(need.devices)} ({need.how})",
        "made up of": ", ".join(f"{name} {terminal.size(n)}" for name, n in need.parts.items()),
        "enough for": ", ".join(filter(None, (tokens, running))),
        "loads in": None if need.load_s is None else terminal.span(need.load_s),
        "fits": _verdict(plan),
        "largest context": plan.largest_context,
        "why": plan.reason,
    }
    yield from terminal.aligned((), [fact for fact in facts.items() if fact[1] not in (None, "")])
    if plan.devices:
        yield ""
        yield from _device_lines(plan.devices)


def _verdict(plan: Plan) -> str:
    if plan.loaded:
        return "it is loaded"
    if plan.fits and plan.evict:
        return f"yes, when these go: {', '.join(plan.evict)}"
    return "yes" if plan.fits else "no"
