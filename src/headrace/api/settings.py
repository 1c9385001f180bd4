"""What the HTTP surface can be told."""

from __future__ import annotations

import re

import msgspec

from headrace.core.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask, how much, and how streams behave. Sizes are bytes, times are seconds.

    `host` is the address the server is bound to. `allowed_hosts` and `allowed_origins` add to
    the loopback names; `*` allows all. `key_hashes` are SHA-256 in lower-case hex; when there is
    one, every route but /health* needs a key. `deadline_s` bounds a request from its arrival.

    Raises:
        ConfigError: a key hash is not a SHA-256 in hex, or a limit is not positive.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    key_hashes: tuple[str, ...] = ()
    system_fingerprint: str = "headrace"
    max_body: int = 8 << 20
    max_head: int = 32 << 10
    max_url: int = 8 << 10
    max_depth: int = 64
    max_messages: int = 2048
    max_prompts: int = 128
    max_choices: int = 256
    max_stop: int = 16
    max_logit_bias: int = 1024
    parallel_prompts: int = 8
    body_timeout_s: float = 60.0
    deadline_s: float | None = None
    headers_after_s: float = 5.0
    comment_every_s: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        for value in self.key_hashes:
            if not _SHA256.fullmatch(value):
                raise ConfigError("key_hashes: each is a SHA-256 in lower-case hex.")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ConfigError(f"{name}: must be positive, not {value}.")
