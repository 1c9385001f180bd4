"""`headrace cluster up` and `down`: the nodes of a Ray cluster."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace import __version__
from headrace.cluster import secure
from headrace.cluster.detached import digest_of
from headrace.cluster.directory import parse_address, ray_directory
from headrace.cluster.wire import Placed
from headrace.config import Config
from headrace.core.errors import ConfigError, UnknownModel
from headrace.core.install import install_command
from headrace.ray_cluster.agent import APPLICATION, MANAGER, NAMESPACE, Plan
from headrace.ray_cluster.manager import Manager

_EVERY_S = 0.5
_CALL_S = 30.0
_PROBE_S = 5.0
_PROBE = "/ray.rpc.NodeInfoGcsService/CheckAlive"

Show = Callable[[Sequence[Placed]], None]
"""Called with the nodes whenever their states have changed."""


def up(config: Config, file: Path, *, insecure: bool, within_s: float, show: Show) -> list[Placed]:
    """Place a node on each machine of the Ray cluster, as a file configures it; return them.

    What runs as the file configures it is left as it is; others are replaced, one at a time.
    Nodes that do not run after `within_s` are returned too: Ray goes on to place them.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or accepts anyone.
    """
    plan = Plan(str(file.resolve()), digest_of(file), __version__)
    secure.demand(secure.credentials(config.cluster), ray_directory(config.cluster).host)
    with _joined(config, insecure=insecure) as ray:
        _remove(ray)
        manager = (
            ray.remote(Manager)
            .options(
                name=MANAGER,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
                resources={"node:__internal_head__": 0.001},
            )
            .remote(plan)
        )
        return _wait(ray, manager, lambda node: node.state == "running", within_s, show)


def down(config: Config, *, insecure: bool, within_s: float, show: Show) -> list[Placed]:
    """End all nodes, after their running answers, and their agents; return the nodes.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        UnknownModel: there are no nodes.
    """
    with _joined(config, insecure=insecure) as ray:
        from ray import serve

        manager = _manager(ray)
        if manager is None:
            raise UnknownModel("`headrace cluster up` has placed no nodes on this Ray cluster.")
        ray.get(manager.end.remote(), timeout=_CALL_S)
        over = ("ended", "left alone", "no agent yet")
        nodes = _wait(ray, manager, lambda node: node.state in over, within_s, show)
        serve.delete(APPLICATION)
        if not serve.status().applications:
            serve.shutdown()
        _remove(ray)
        return nodes


@contextmanager
def _joined(config: Config, *, insecure: bool) -> Generator[Any]:
    """Connect this process to the Ray cluster of the configuration."""
    address = config.cluster.ray
    ray_directory(config.cluster)
    assert address is not None, "it was checked"
    try:
        if not insecure:
            demand_authentication(address)
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(f"Ray is not installed: {install_command('ray')}.") from error
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"Ray at {address} cannot be joined: {reason}", param="ray") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def demand_authentication(address: str) -> None:
    """Check that the head of a Ray cluster refuses a caller without a token, and takes this one's.

    Raises:
        ConfigError: it accepts anyone, does not accept this process, or cannot be reached.
    """
    parse_address(address)
    if _is_accepted(address, ""):
        raise ConfigError(
            f"Ray at {address} lets anyone who reaches it run programs. Start all its machines "
            "with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or allow it with --insecure.",
            param="ray",
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not _is_accepted(address, _token()):
        raise ConfigError(
            f"Ray at {address} does not accept the token of this process: set RAY_AUTH_TOKEN_PATH "
            "to the file with the token of its machines.",
            param="ray",
        )


def _token() -> str:
    """Return the token of Ray, from where Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"The token of Ray: {file}: {error.strerror or error}.") from error


def _is_accepted(address: str, token: str) -> bool:
    """Whether the head answers a caller with this token.

    Raises:
        ConfigError: it cannot be reached.
    """
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with _channel(address) as channel:
        call = channel.unary_unary(_PROBE, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=_PROBE_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            message = f"Ray at {address} cannot be reached: {error.details()}"
            raise ConfigError(message, param="ray") from error
    return True


def _channel(address: str) -> Any:
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") != "1":
        return grpc.insecure_channel(address)
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    files = [Path(os.environ.get(name, "")).read_bytes() for name in names]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))


def _manager(ray: Any) -> Any:
    try:
        return ray.get_actor(MANAGER, namespace=NAMESPACE)
    except ValueError:
        return None


def _remove(ray: Any) -> None:
    """End the manager, so that its name and its port are free."""
    end = time.monotonic() + _CALL_S
    while (manager := _manager(ray)) is not None and time.monotonic() < end:
        ray.kill(manager)
        time.sleep(_EVERY_S)


def _wait(
    ray: Any, manager: Any, is_over: Callable[[Placed], bool], within_s: float, show: Show
) -> list[Placed]:
    end = time.monotonic() + within_s
    shown: list[Placed] = []
    while True:
        nodes = sorted(ray.get(manager.nodes.remote(), timeout=_CALL_S), key=lambda n: n.address)
        if nodes != shown:
            show(nodes)
            shown = nodes
        if time.monotonic() > end or (nodes and all(map(is_over, nodes))):
            return nodes
        time.sleep(_EVERY_S)
