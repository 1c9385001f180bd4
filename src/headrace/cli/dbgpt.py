"""A service as a worker of a DB-GPT cluster: its address, its server, its settings."""

from __future__ import annotations

import logging
import socket
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from headrace.api.app import Application
from headrace.api.dbgpt.cluster import Cluster, ClusterSettings
from headrace.api.dbgpt.controller import Address
from headrace.api.limits import ApiSettings
from headrace.api.server import Server
from headrace.config import Config, DbgptSettings, Settings
from headrace.core.backend import Admin, Backend
from headrace.core.errors import ConfigError

_log = logging.getLogger("headrace.dbgpt")
_ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - compared, not bound


def api_settings(config: Config) -> ApiSettings:
    """Return the settings of the API: the fields of the configuration with the same names."""
    settings = msgspec.convert(config.server, ApiSettings, from_attributes=True)
    return replace(settings, metrics_keys=config.telemetry.metrics_keys)


class DbgptWorker:
    """The server for a cluster, and the registration there."""

    def __init__(
        self,
        app: Application,
        backend: Backend,
        admin: Admin,
        settings: Settings,
        listener: socket.socket,
    ) -> None:
        config = settings.config
        self._settings = config.dbgpt
        self._address = advertised(config.dbgpt, listener)
        self.cluster = Cluster(
            backend,
            admin,
            ClusterSettings(
                controllers=config.dbgpt.controller,
                address=self._address,
                heartbeat_s=config.dbgpt.heartbeat_s,
                without_key=config.dbgpt.without_key,
            ),
        )
        self._app = app.dbgpt_worker(self.cluster, worker_settings(config, self._address))
        self.server = Server(self._app, config.server.max_idle_connections)

    def apply(self, settings: Settings) -> None:
        """Use a configuration that was read again; that of `[dbgpt]` stays."""
        config = settings.config.model_copy(update={"dbgpt": self._settings})
        applied = worker_settings(config, self._address)
        self._app.replace_settings(applied)
        if applied.has_keys:
            _log.warning("The service needs a key now, and DB-GPT sends none: it is refused.")


def worker_settings(config: Config, address: Address) -> ApiSettings:
    """Return the settings of the routes for a cluster. Keys count unless they may be left out."""
    settings = api_settings(config)
    hosts = (*settings.allowed_hosts, address.host.strip("[]"))
    settings = replace(settings, host=config.dbgpt.host, allowed_hosts=hosts)
    if config.dbgpt.without_key == "refuse":
        return settings
    return replace(settings, api_keys=(), admin_keys=(), metrics_keys=(), uses_database=False)


def advertised(settings: DbgptSettings, listener: socket.socket) -> Address:
    """Return the address that is registered: as configured, or where the socket listens.

    Raises:
        ConfigError: the socket listens on every address, and the controller has none.
    """
    host, port = settings.host, int(listener.getsockname()[1])
    if settings.advertise is not None:
        parts = urlsplit(f"//{settings.advertise}")
        host, port = parts.hostname or "", parts.port or port
    elif host in _ANY_ADDRESS:
        host = _own_address(settings.controller[0])
    # DB-GPT puts it into URLs as it is.
    return Address(f"[{host}]" if ":" in host else host, port)


def _own_address(controller: str) -> str:
    """Return the address of this machine from which it reaches a controller; sends nothing."""
    parts = urlsplit(controller)
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"The address of this machine towards {controller} is not known "
            f"({error.strerror or error}); set dbgpt.advertise.",
            param="dbgpt.advertise",
        ) from error
