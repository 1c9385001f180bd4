"""What the HTTP surface can be told."""

from __future__ import annotations

import re

import msgspec

from headrace.core.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask, how much, and how streams behave. Sizes are bytes, times are seconds.

    `host` is the address the server is bound to. `allowed_hosts` and `allowed_origins` add to
    the loopback names; `*` allows all. `key_hashes` and `admin_key_hashes` are SHA-256 in
    lower-case hex; when there is one, every route but /health* needs a key, and what manages
    models an admin key. `metrics_key_hashes` are those of keys that open /metrics and nothing
    else; when there is a key of any kind, /metrics needs one of these or an admin's.
    `deadline_s` bounds a request from its arrival. `load_wait_s` is how long a request that is
    not streamed waits for its model to load.

    Raises:
        ConfigError: a key hash is not a SHA-256 in hex, or a limit is not positive.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    key_hashes: tuple[str, ...] = ()
    admin_key_hashes: tuple[str, ...] = ()
    metrics_key_hashes: tuple[str, ...] = ()
    system_fingerprint: str = "headrace"
    max_body: int = 8 << 20
    max_head: int = 32 << 10
    max_url: int = 8 << 10
    max_depth: int = 64
    max_messages: int = 2048
    max_prompts: int = 128
    max_choices: int = 256
    max_inputs: int = 2048
    max_documents: int = 2048
    max_stop: int = 16
    max_logit_bias: int = 1024
    parallel_prompts: int = 8
    body_timeout_s: float = 60.0
    deadline_s: float | None = None
    load_wait_s: float = 30.0
    headers_after_s: float = 5.0
    comment_every_s: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        for name in ("key_hashes", "admin_key_hashes", "metrics_key_hashes"):
            if not all(_SHA256.fullmatch(value) for value in getattr(self, name)):
                raise ConfigError(f"{name}: each is a SHA-256 in lower-case hex.")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 0 if name == "load_wait_s" else 1e-9
            if isinstance(value, int | float) and value < least:
                raise ConfigError(f"{name}: must be positive, not {value}.")

    @property
    def has_keys(self) -> bool:
        """Tell whether a key is needed to ask."""
        return bool(self.key_hashes or self.admin_key_hashes)
