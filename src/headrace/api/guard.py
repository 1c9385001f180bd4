"""What is refused by its head alone: sizes, foreign hosts and foreign origins."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import Scope

from headrace.api.problems import Problem, Refused
from headrace.api.settings import ApiSettings

HeaderList = Iterable[tuple[bytes, bytes]]

_FORWARDED = frozenset(
    {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def check_sizes(path: bytes, query: bytes, headers: HeaderList, settings: ApiSettings) -> None:
    """Bound the URL and the header.

    Raises:
        Refused: 414 or 431.
    """
    if len(path) + len(query) > settings.max_url:
        raise _refused(414, f"The URL is longer than {settings.max_url} bytes.", "url_too_long")
    # 4 bytes a line for what separates name and value.
    if sum(len(name) + len(value) + 4 for name, value in headers) > settings.max_head:
        raise _refused(
            431, f"The header is larger than {settings.max_head} bytes.", "header_too_large"
        )


def check_host(headers: HeaderList, settings: ApiSettings) -> None:
    """Refuse hosts that are not ours: a foreign page may have rebound its name to this address.

    Raises:
        Refused: 403.
    """
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    if not hosts or not all(_is_ours(_hostname(host), settings) for host in hosts):
        raise _refused(
            403, "This Host is not served here; `allowed_hosts` can add it.", "host_not_allowed"
        )


def check_origin(origin: str, settings: ApiSettings) -> None:
    """Refuse what a foreign web page sends.

    Raises:
        Refused: 403.
    """
    allowed = settings.allowed_origins
    if "*" in allowed or origin in allowed:
        return
    try:
        loopback = urlsplit(origin).hostname in _LOOPBACK
    except ValueError:
        loopback = False
    if not loopback:
        raise _foreign_origin()


def check_site(headers: dict[bytes, bytes]) -> None:
    """Refuse what a foreign web page asks for without an Origin: pictures and links are GETs.

    Raises:
        Refused: 403.
    """
    if headers.get(b"sec-fetch-site") == b"cross-site" and b"origin" not in headers:
        raise _foreign_origin()


def is_local(scope: Scope) -> bool:
    """Tell whether a request comes from this machine, and not through somebody's proxy."""
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    # Another page on this machine is not its operator.
    if any(origin.partition("://")[2] not in hosts for origin in origins):
        return False
    peer = str((scope.get("client") or ("127.0.0.1",))[0]).removeprefix("::ffff:")
    loopback = _is_address(peer) and ipaddress.ip_address(peer).is_loopback
    return loopback and all(_hostname(host) in _LOOPBACK for host in hosts)


def _is_ours(host: str, settings: ApiSettings) -> bool:
    allowed = {name.lower() for name in settings.allowed_hosts}
    if host in _LOOPBACK or "*" in allowed or host in allowed:
        return True
    if settings.host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        # Only names can be rebound: whoever sends an address has reached this machine by it.
        return _is_address(host)
    return host == settings.host.lower()


def _hostname(host: str) -> str:
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name.lower() if not rest or rest.startswith(":") else ""
    return host.partition(":")[0].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _foreign_origin() -> Refused:
    message = "This Origin is not allowed; `allowed_origins` can add it."
    return _refused(403, message, "origin_not_allowed")


def _refused(status: int, message: str, code: str) -> Refused:
    return Refused(Problem(status=status, message=message, code=code))
