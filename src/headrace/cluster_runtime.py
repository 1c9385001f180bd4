"""Builds nodes and fronts of a cluster from a configuration."""

from __future__ import annotations

from collections.abc import Callable

from headrace.cluster import secure
from headrace.cluster.admin import ClusterAdmin
from headrace.cluster.directory import directories
from headrace.cluster.link import connector
from headrace.cluster.local import NodePoolAdmin
from headrace.cluster.node import NodeServer
from headrace.cluster.pool import ClusterPool
from headrace.config import Settings
from headrace.pool.admin import PoolAdmin
from headrace.telemetry import otel
from headrace.telemetry.telemetry import Telemetry


def open_node(settings: Settings, admin: PoolAdmin) -> NodeServer:
    """Return what serves the fronts of a cluster with a pool of this machine.

    Raises:
        ConfigError: the token or the certificates cannot be read.
    """
    assert isinstance(admin, NodePoolAdmin), "the service was opened as a node"
    member = secure.member(settings.config.cluster)
    admin.labels = (member.identity.name, *member.labels)
    return NodeServer(admin.pool, admin, member)


def open_front(
    settings: Settings, *, reread: Callable[[], Settings]
) -> tuple[ClusterAdmin, Telemetry]:
    """Return the pool of a cluster with its Admin, and its telemetry; no node is connected yet.

    Raises:
        ConfigError: there are no addresses of nodes, or the token or certificates cannot be read.
    """
    config = settings.config
    member = secure.member(config.cluster)
    pool = ClusterPool(directories(config.cluster, member), member, connector(member.access))
    admin = ClusterAdmin(pool, reread=lambda: settings.needs_restart(reread()))
    tracing = otel.configure()
    return admin, Telemetry(
        admin, tracing, config.telemetry, config.home, config.server.database or ""
    )
