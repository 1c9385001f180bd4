"""`headrace ps`: how the models and the devices of a running service stand."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from headrace.cli import terminal
from headrace.cli.common import Common
from headrace.core.status import DeviceStatus, ModelStatus, PoolStatus, ReplicaStatus

if TYPE_CHECKING:
    from headrace.cli.client import Client

_EVERY_S = 1.0
_LONGEST_ERROR = 60
_MODEL_HEADS = ("NAME", "STATE", "ENGINE", "MEMORY", "QUEUE", "UNTIL", "RESTARTS", "ERROR")
DEVICE_HEADS = ("DEVICE", "BUDGET", "BOOKED", "FREE")
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The service; else HEADRACE_URL, or where the configuration says.",
        show_default=False,
    ),
]


def ps(
    common: Common,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it anew each second, until Ctrl-C.")
    ] = False,
    url: Url = None,
) -> None:
    """List the models of a running service: state, memory, queue; and its devices.

    With -v it tells why each model runs on its engine.
    """
    from headrace.cli.client import ask

    ask(common.settings(), url, lambda client: _watch(client, common, again=watch))


async def _watch(client: Client, common: Common, *, again: bool) -> None:
    while True:
        status = await client.status()
        if common.as_json and again:
            print(msgspec.json.encode(status).decode(), flush=True)
        elif common.as_json:
            terminal.print_json(status)
        else:
            text = table(status, time.time(), reasons=bool(common.verbose))
            _print(text, in_place=again and sys.stdout.isatty())
        if not again:
            return
        await asyncio.sleep(_EVERY_S)


def _print(text: str, *, in_place: bool) -> None:
    """Print a table; in place each line is overwritten, so that nothing flickers."""
    if in_place:
        text = _HOME + text.replace("\n", f"{_END_OF_LINE}\n") + _REST
    sys.stdout.write(text)
    sys.stdout.flush()


def table(status: PoolStatus, now: float, *, reasons: bool = False) -> str:
    """Return both tables as text, and why each engine was chosen; `now` is Unix time."""
    rows = [row for model in status.models for row in _rows(model, now)]
    above = terminal.aligned(_MODEL_HEADS, rows)
    below = terminal.aligned(DEVICE_HEADS, devices(status.devices))
    why = [f"{one.id}: {one.engine_reason}" for one in status.models if one.engine_reason]
    last = ("", *map(terminal.printable, why)) if reasons and why else ()
    return "".join(f"{line}\n" for line in (*above, "", *below, *last))


def devices(found: Sequence[DeviceStatus]) -> list[tuple[str | None, ...]]:
    """Return name, budget, booked and free memory of each device."""
    sizes = ((one.name, (one.budget, one.booked, one.free)) for one in found)
    return [(name, *map(terminal.size, amounts)) for name, amounts in sizes]


def _rows(model: ModelStatus, now: float) -> Iterator[tuple[str | None, ...]]:
    error = " ".join((model.last_error or "").split())[:_LONGEST_ERROR]
    yield (
        model.id,
        _state(model),
        model.engine or None,
        _memory(model),
        f"{model.running}/{model.max_running or '-'} + {model.queued}/{model.max_queued}",
        _until(model, now),
        str(model.restarts),
        error or None,
    )
    if len(model.replicas) > 1:
        yield from map(_replica, model.replicas)


def _replica(one: ReplicaStatus) -> tuple[str | None, ...]:
    load = f"{one.running} running"
    name = f"  #{one.number}"
    return name, one.state, None, amounts(one.memory), load, None, None, one.reason


def _state(model: ModelStatus) -> str:
    if not model.enabled:
        return "disabled"
    if model.progress is None:
        return model.state
    share = f" {100 * model.done // model.total}%" if model.total else ""
    return f"{model.state} ({model.progress}{share})"


def _memory(model: ModelStatus) -> str | None:
    if model.memory or model.estimated is None:
        return amounts(model.memory)
    needed = amounts(model.estimated.devices)
    return needed and f"~{needed}"


def amounts(memory: Mapping[str, int]) -> str | None:
    """Return bytes by device as text; the device is left out where it is only the CPU."""
    if list(memory) == ["cpu"]:
        return terminal.size(memory["cpu"])
    return " + ".join(f"{terminal.size(size)} {name}" for name, size in memory.items()) or None


def _until(model: ModelStatus, now: float) -> str | None:
    if model.pinned:
        return "pinned"
    if model.state != "ready":
        return None
    return "for ever" if model.until is None else f"in {span(model.until - now)}"


def span(seconds: float) -> str:
    """Return a time as people say it: `42s`, `3m20s`, `2h05m`."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
