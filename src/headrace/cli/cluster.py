"""`headrace cluster`: a node, a front, and what an operator does with them."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.cli.common import Common, ModelFlags, Url, given, with_common
from headrace.cli.serve import Models, ServiceFlags, run, wanted
from headrace.core.errors import ConfigError
from headrace.core.status import NodeStatus

if TYPE_CHECKING:
    from headrace.cluster.wire import Placed
    from headrace.config import Settings
    from headrace.core.model import ModelSpec

app = typer.Typer(help="Serve with several machines.", no_args_is_help=True)

_HEADS = ("NODE", "STATE", "ADDRESS", "LABELS", "LOADED", "RUNNING", "QUEUED", "FOR", "REASON")
_PLACED = ("NODE", "ADDRESS", "STATE", "REASON")

TokenFile = Annotated[
    Path | None, Option(metavar="FILE", help="Secret that nodes and fronts share.")
]


@dataclass(frozen=True)
class _NodeFlags:
    """Settings of a node; None is not given."""

    wire_host: Annotated[str | None, Option(help="Address to listen on for fronts.")] = None
    wire_port: Annotated[int | None, Option(help="Port for fronts; 0 takes a free one.")] = None
    node_name: Annotated[str | None, Option(help="Name in the cluster; by default the host's.")] = (
        None
    )
    labels: Annotated[str | None, Option(help="Labels, separated by commas.")] = None
    token_file: TokenFile = None


@dataclass(frozen=True)
class _FrontFlags:
    """Settings of a front; None is not given."""

    nodes: Annotated[
        str | None, Option(help="Addresses of nodes, HOST:PORT, separated by commas.")
    ] = None
    dns: Annotated[str | None, Option(help="NAME:PORT whose addresses are nodes.")] = None
    ray: Annotated[
        str | None, Option(help="HOST:PORT of Ray's head, where `cluster up` was run.")
    ] = None
    token_file: TokenFile = None


def node(
    common: Common,
    models: Models = None,
    *,
    service: ServiceFlags,
    flags: ModelFlags,
    cluster: _NodeFlags,
    record: Annotated[Path | None, Option(hidden=True)] = None,
) -> None:
    """Serve models of this machine to the fronts of a cluster, and over HTTP as `serve` does.

    Fronts decide what is loaded at first. A model whose `nodes` are set is served by nodes with
    one of these labels, or names.
    """
    more = {**given(service), **given(cluster)}

    def read() -> tuple[Settings, list[ModelSpec]]:
        settings = flags.settings(common, service=True, **more)
        return settings, _allowed(settings, wanted(settings, models or []))

    if record is None:
        run(read, as_json=bool(common.as_json), wire=_listen)
        return
    from headrace.cli.detached import Detached

    with Detached(record) as detached:
        run(
            read,
            as_json=bool(common.as_json),
            wire=lambda settings: detached.listen(settings, _listen(settings)),
            listening=detached.publish,
        )


def front(common: Common, *, service: ServiceFlags, cluster: _FrontFlags) -> None:
    """Answer requests with the models of all nodes; run two of them where one may fail.

    Nodes may join and leave at any time. No model runs here.
    """
    more = {**given(service), **given(cluster)}
    left_out = {"max_running", "max_queued", "keep_alive", "continuation"} & more.keys()
    if left_out:
        name = min(left_out).replace("_", "-")
        raise ConfigError(f"flag --{name}: is set at the nodes, where the models run.")

    def read() -> tuple[Settings, list[ModelSpec]]:
        return common.settings(service=True, **more), []

    from headrace.cluster_runtime import open_front

    settings, _ = read()
    run(
        read,
        as_json=bool(common.as_json),
        open=lambda reread: open_front(settings, reread=lambda: reread()[0]),
    )


def status(common: Common, url: Url = None) -> None:
    """Show the nodes of a front: state, labels, loaded models, requests."""
    nodes = common.ask(url, lambda client: client.status()).nodes
    if not nodes and not common.as_json:
        terminal.note("This service has no nodes: it is no front of a cluster.")
    now = time.time()
    rows = [_row(each, now) for each in nodes]
    heads = _HEADS
    if any(node.placed for node in nodes):
        heads = (*heads, "PLACED BY RAY")
        rows = [(*row, node.placed) for row, node in zip(rows, nodes, strict=True)]
    common.show(nodes, terminal.aligned(heads, rows))


def drain(
    common: Common,
    node: Annotated[str, Argument(metavar="NODE", help="Name of the node.")],
    off: Annotated[bool, Option("--off", help="Send requests to it again.")] = False,
    url: Url = None,
) -> None:
    """Send nothing new to a node; its running answers end.

    A node that gets SIGTERM does the same by itself, and ends.
    """
    drained = common.ask(url, lambda client: client.drain(node, on=not off))
    common.show(drained, _lines(drained, off=off))


Insecure = Annotated[
    bool, Option("--insecure", help="Allow a Ray cluster that needs no token: for tests alone.")
]
Within = Annotated[float, Option(help="Seconds to wait for the nodes.")]


def up(
    common: Common,
    path: Annotated[
        Path, Argument(metavar="FILE", help="Configuration, at the same path on all machines.")
    ],
    wait_s: Within = 300.0,
    insecure: Insecure = False,
) -> None:
    """Place a node on each machine of a Ray cluster that has the resource headrace_node.

    Nodes that run as the file configures them are left alone; others are replaced one after the
    other. Run it again after changes of the file, which has to be copied to all machines first.
    """
    from headrace.ray_cluster.up import up

    config = replace(common, file=path).settings().config
    nodes = up(config, path, insecure=insecure, within_s=wait_s, show=_progress(common))
    _show_placed(common, nodes)
    if not nodes or any(node.state != "running" for node in nodes):
        raise ConfigError(
            f"Not all nodes run after {wait_s:g} s; Ray goes on to place them."
            if nodes
            else "No machine of the Ray cluster has the resource headrace_node."
        )


def down(common: Common, wait_s: Within = 300.0, insecure: Insecure = False) -> None:
    """End the nodes that `up` has placed, after their running answers."""
    from headrace.ray_cluster.up import down

    config = common.settings().config
    nodes = down(config, insecure=insecure, within_s=wait_s, show=_progress(common))
    _show_placed(common, nodes)


def _progress(common: Common) -> Callable[[Sequence[Placed]], None]:
    """Return what notes the states of nodes while they are placed."""

    def show(nodes: Sequence[Placed]) -> None:
        counts = Counter(node.state for node in nodes)
        if not common.as_json:
            texts = [f"{count} {state}" for state, count in sorted(counts.items())]
            terminal.note(", ".join(texts) or "waiting for Ray")

    return show


def _show_placed(common: Common, nodes: Sequence[Placed]) -> None:
    rows = [(node.node, node.address, node.state, node.reason or None) for node in nodes]
    value = [dict(zip(("node", "address", "state", "reason"), row, strict=True)) for row in rows]
    common.show(value, terminal.aligned(_PLACED, rows))


for _command in (node, front, up, down, status, drain):
    app.command(_command.__name__)(with_common(_command))


def _listen(settings: Settings) -> socket.socket:
    from headrace.cluster import secure

    cluster = settings.config.cluster
    return secure.listen(cluster, secure.credentials(cluster))


def _allowed(settings: Settings, specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """Return the models that may run on this node.

    Raises:
        ConfigError: there is none.
    """
    from headrace.cluster import secure
    from headrace.cluster.policy import allows

    name = secure.name_of(settings.config.cluster)
    labels = settings.config.cluster.labels
    allowed = [spec for spec in specs if allows(spec.nodes, name, labels)]
    if not allowed:
        raise ConfigError(
            f"No model may run on the node {name}, by their `nodes`; its labels are "
            f"{', '.join(labels) or 'none'}."
        )
    return allowed


def _row(node: NodeStatus, now: float) -> tuple[str | None, ...]:
    return (
        node.name or None,
        node.state,
        node.address,
        ", ".join(node.labels) or None,
        ", ".join(node.models) or None,
        str(node.running),
        str(node.queued),
        terminal.span(max(0.0, now - node.since)) if node.since else None,
        node.reason,
    )


def _lines(node: NodeStatus, *, off: bool) -> Iterator[str]:
    if off:
        yield terminal.printable(f"{node.name} takes requests")
    else:
        yield terminal.printable(f"{node.name} is draining, {node.running} running")
