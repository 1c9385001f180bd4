"""`headrace adapters`: the LoRA adapters of a model of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.cli.common import Common, ModelArgument, Url, with_common
from headrace.core.status import ModelStatus

app = typer.Typer(help="List, add and remove adapters of a model.", no_args_is_help=True)

_HEADS = ("ADAPTER", "NAMES", "SOURCE")
_RELATIVE = ("./", "../", "~")

Adapter = Annotated[str, Argument(metavar="ADAPTER", help="Requests name it MODEL:ADAPTER.")]


def list_(common: Common, model: ModelArgument, url: Url = None) -> None:
    """List the adapters of a model, with the names that requests use."""
    cards = common.ask(url, lambda client: client.adapters(model))
    rows = [(card.adapter, ", ".join((card.id, *card.aliases)), card.source) for card in cards]
    common.show(cards, terminal.aligned(_HEADS, rows))


def add(
    common: Common,
    model: ModelArgument,
    adapter: Adapter,
    source: Annotated[
        str, Argument(metavar="SOURCE", help="A path of the machine that serves, or hub:ORG/REPO.")
    ],
    scale: Annotated[float, Option(help="What its changes are multiplied by.")] = 1.0,
    name: Annotated[str | None, Option(help="A name in requests, beside MODEL:ADAPTER.")] = None,
    url: Url = None,
) -> None:
    """Add an adapter to a model while it serves; running requests end as they began.

    It is checked against the model before. One with the same key is replaced.
    """
    if source.startswith(_RELATIVE):
        source = str(Path(source).expanduser().absolute())
    body = {"adapter": adapter, "source": source, "scale": scale, "name": name}
    status = common.ask(url, lambda client: client.add_adapter(model, body))
    _show(common, status, f"{adapter} was added")


def remove(common: Common, model: ModelArgument, adapter: Adapter, url: Url = None) -> None:
    """Remove an adapter from a model; its running requests end before."""
    status = common.ask(url, lambda client: client.remove_adapter(model, adapter))
    _show(common, status, f"{adapter} was removed")


def _show(common: Common, status: ModelStatus, change: str) -> None:
    common.show(status, [terminal.printable(f"{change}; {status.id} is {status.state}")])


for _name, _command in (("list", list_), ("add", add), ("remove", remove)):
    app.command(_name)(with_common(_command))
