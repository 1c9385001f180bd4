"""Who may connect: the token of a cluster and its certificates, and the proof of a greeting."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import secrets
import socket
import ssl
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace import __version__
from headrace.cluster.wire import PROTOCOL, Hello, Side
from headrace.config.cluster import ClusterSettings
from headrace.core.errors import ConfigError

_NONCE_BYTES = 32
_SHORTEST_TOKEN = 16
_BACKLOG = 128


class Refusal(Exception):
    """The other side is not accepted; the text is safe to send to it."""


class Credentials(NamedTuple):
    """What this process proves itself with. Without a token or TLS only loopback is allowed."""

    token: bytes = b""
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None

    @property
    def is_open(self) -> bool:
        """Whether any process that can connect is accepted."""
        return not self.token and self.server is None


def credentials(settings: ClusterSettings) -> Credentials:
    """Read the files that the settings name.

    Raises:
        ConfigError: one cannot be read, or is not what it should be.
    """
    token = b"" if settings.token_file is None else _token(settings.token_file)
    if settings.tls is None:
        return Credentials(token)
    server = _context(ssl.PROTOCOL_TLS_SERVER, settings.tls)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, settings.tls)
    try:
        _shake_hands(client, server)
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or error.reason or str(error)
        message = f"cluster.tls: others would not accept {settings.tls['cert']}: {why}."
        raise ConfigError(message, param="tls") from error
    return Credentials(token, server, client)


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Connect this process to itself in memory, so that both sides check the certificate.

    Raises:
        SSLError: it has expired, or is of another authority.
    """
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    # A side that has ended may have to send something yet.
    for side in [*sides, *sides]:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()


def _token(path: Path) -> bytes:
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        message = f"cluster.token_file: {path}: {error.strerror or error}."
        raise ConfigError(message, param="token_file") from error
    if len(token) < _SHORTEST_TOKEN:
        raise ConfigError(
            f"cluster.token_file: {path}: a token has {_SHORTEST_TOKEN} or more characters.",
            param="token_file",
        )
    return token


def _context(protocol: int, files: dict[str, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Who has a certificate of the cluster's own authority is a member, whatever its address.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(files["ca"])
        context.load_cert_chain(files["cert"], files["key"])
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(str(path) for path in files.values())
        message = f"cluster.tls: {names}: {error.strerror or error}."
        raise ConfigError(message, param="tls") from error
    return context


def listen(settings: ClusterSettings, access: Credentials) -> socket.socket:
    """Return a socket that listens for fronts.

    Raises:
        ConfigError: the address is beyond loopback without a token or TLS, or cannot be bound.
    """
    host, port = settings.wire_host, settings.wire_port
    try:
        return listen_at(host, port, access)
    except OSError as error:
        message = f"Cannot listen on {host}:{port}: {error.strerror or error}."
        raise ConfigError(message, param="wire_port") from error


def listen_at(host: str, port: int, access: Credentials) -> socket.socket:
    """Return a socket that listens at an address, which a name may be of.

    Raises:
        ConfigError: it is beyond loopback without a token or TLS.
        OSError: it cannot be bound.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    demand(access, str(address[0]), host)
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)


def demand(access: Credentials, address: str, host: str = "") -> None:
    """Demand a token or TLS for an address beyond loopback, which `host` has named.

    Raises:
        ConfigError: there is neither.
    """
    if access.is_open and not is_loopback(address):
        raise ConfigError(
            f"{host or address} is reachable from other machines: set cluster.token_file or "
            "cluster.tls.",
            param="wire_host",
        )


def is_loopback(address: str) -> bool:
    """Whether an address, not a name, is of this machine alone."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


class Identity(NamedTuple):
    """The name of a node or a front, and what differs for each of its processes."""

    name: str
    instance: str

    def hello(self) -> Hello:
        """Return a Hello with a new nonce."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return Hello(PROTOCOL, __version__, self.name, self.instance, nonce, time.time())


def name_of(settings: ClusterSettings) -> str:
    """Return the name of this process in the cluster."""
    return settings.node_name or socket.gethostname()


class Member(NamedTuple):
    """This process as a member of a cluster, and how long silence may last."""

    identity: Identity
    access: Credentials
    labels: tuple[str, ...] = ()
    heartbeat_s: float = 0.5
    silence_s: float = 2.0


def member(settings: ClusterSettings) -> Member:
    """Return this process as a member of the cluster.

    Raises:
        ConfigError: the token or the certificates cannot be read.
    """
    identity = Identity(name_of(settings), secrets.token_hex(8))
    access = credentials(settings)
    return Member(identity, access, settings.labels, settings.heartbeat_s, settings.silence_s)


def check(hello: Hello, side: Side) -> None:
    """Check the Hello of the other side, which is a `side`.

    Raises:
        Refusal: it has another protocol, or is malformed.
    """
    if hello.protocol != PROTOCOL:
        raise Refusal(
            f"The {side} {hello.name} ({hello.version}) has protocol {hello.protocol}, "
            f"and the other side ({__version__}) has protocol {PROTOCOL}."
        )
    if len(hello.nonce) != _NONCE_BYTES or not hello.name.isprintable() or not hello.name:
        raise Refusal("The Hello is malformed.")


def proof(token: bytes, side: Side, front: Hello, node: Hello) -> bytes:
    """Return the proof of one side, which holds for this connection only."""
    greetings = [
        (hello.protocol, hello.name, hello.instance, hello.nonce) for hello in (front, node)
    ]
    message = msgspec.msgpack.encode(("headrace", side, greetings))
    return hmac.new(token, message, hashlib.sha256).digest()


def verify(mac: bytes, token: bytes, side: Side, front: Hello, node: Hello) -> None:
    """Check the proof of the other side, which is a `side`.

    Raises:
        Refusal: it does not have the token.
    """
    if not hmac.compare_digest(mac, proof(token, side, front, node)):
        raise Refusal(f"The {side} does not have the token of this cluster.")
