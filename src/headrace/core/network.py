"""Addresses of other machines."""

from __future__ import annotations

import socket


def network_of(address: str) -> str:
    """Return an IPv4 address, or the network of an IPv6 address, which one client has whole."""
    address = address.removeprefix("::ffff:").partition("%")[0]
    return address if ":" not in address else socket.inet_pton(socket.AF_INET6, address)[:8].hex()
