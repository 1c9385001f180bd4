"""The settings of a service over HTTP, and limits that are the same for all services.

Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from headrace.api.fields import OnUnknown, ReasoningField
from headrace.core.errors import ConfigError, InvalidRequest

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
# One level down, one up; in parts, so that depth without an end is found at its beginning.
_AS_STEPS, _STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff"), 64 << 10

MAX_URL = 8 << 10
MAX_HEADER = 32 << 10
"""All headers of a request together, with 4 bytes a line for what separates name and value."""

MAX_HEADERS = 256
MAX_FRAMING = 16 << 10
"""Extensions and trailers of a chunked body, besides 16 bytes for each byte of content."""

MAX_UNREAD = 64 << 10
"""What a connection holds of a body, or of further requests; then it is not read from."""

MAX_BODIES = 256 << 20
"""Of all bodies together that are being received; above it only small ones are."""

MAX_KEPT = 512 << 20
"""Of the bodies of all requests that run or wait; above it only small ones are accepted."""

SMALL_BODY = 256 << 10
"""Accepted also then, so that a client with many large bodies does not shut out the others."""

MAX_IDLE_CONNECTIONS = 1024
"""Of one client address, without a running request; the default of `max_idle_connections`."""

MAX_DISCARDED = 16 << 20
"""What is read and dropped after an answer, so that the client can read it before the end."""

HEAD_TIMEOUT_S = 10.0
"""For a head, from the opening of the connection or from the first byte of a later head."""

BODY_TIMEOUT_S = 60.0
DISCARD_TIMEOUT_S = 5.0
UNREAD_TIMEOUT_S = 60.0
"""For a client that takes nothing of its answer, while more is to be written."""

IDLE_TIMEOUT_S = 75.0
"""For the next request: longer than clients keep an idle connection, as a request may be on its way
when the server closes one. Python's clients keep it for 5 s, most load balancers for 60 s."""

CLOSE_TIMEOUT_S = 2.0
"""For the last answers when the server stops."""

MAX_DEPTH = 64
"""How deep JSON may be nested."""

MAX_MESSAGES = 2048
MAX_ITEMS = 8192
"""Of a response's input: a turn of an agent has three or more."""

MAX_TOOLS = 128
MAX_PROMPTS = 128
MAX_INPUTS = 2048
MAX_DOCUMENTS = 2048
MAX_PAIRED = 32 << 20
"""Characters of all pairs of a request, in each of which the query counts again."""

MAX_STOP = 16
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 256
"""Choices of one request: its prompts times `n`."""

PARALLEL_PROMPTS = 8
"""Prompts of one request that run at a time."""

COMMENT_EVERY_S = 5.0
"""The time between two comments that keep a silent stream alive."""

_MAY_BE_ZERO = frozenset({"load_wait_s", "max_keep_alive_s", "max_batch_bytes"})
_KEY_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a service, named as in its configuration.

    `host` is the address the server is bound to. `allowed_hosts` and `allowed_origins` add to
    the loopback names; `*` allows all. `api_keys` and `admin_keys` are `sha256:` and the SHA-256
    in lower-case hex; when there is one, every route but /health* needs a key, and managing
    models an admin key. `metrics_keys` open /metrics and nothing else; when there is a key of any
    kind, /metrics needs a metrics key or an admin's. `deadline_s` bounds a request from its
    arrival. `load_wait_s` is how long a request that is not streamed waits for its model to load.
    When there are keys, `keep_alive` of a request without an admin key only lengthens the model's,
    to `max_keep_alive_s` at most.
    `unknown_fields` is what becomes of a body's unknown fields. `max_image_body_bytes` bounds a
    conversation for models that take images or audio; `max_body_bytes` bounds it without these.
    `media_hosts` are hosts from which both are fetched: names, `*.` and a domain, or `*`.
    `reasoning_field` is where chat completions have the thinking. With `list_aliases`, /v1/models
    lists each alias as a model. `console` is whether browsers get the console and /docs.
    `max_batch_bytes` bounds the files of batches, 0 switches them off. `uses_database` is whether
    the keys of a database count too, and `needs_key` whether it has some.

    Raises:
        ConfigError: a key is not hashed, or a limit is not positive.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    metrics_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_image_body_bytes: int = 32 << 20
    media_hosts: tuple[str, ...] = ()
    deadline_s: float | None = None
    load_wait_s: float = 30.0
    max_keep_alive_s: float = 3600.0
    headers_after_s: float = 5.0
    unknown_fields: OnUnknown = "warn"
    reasoning_field: ReasoningField = "reasoning_content"
    list_aliases: bool = False
    console: bool = True
    max_batch_bytes: int = 4 << 30
    uses_database: bool = True
    needs_key: bool = False

    def __post_init__(self) -> None:
        """Check the keys and the limits."""
        for name in ("api_keys", "admin_keys", "metrics_keys"):
            if not all(_KEY_HASH.fullmatch(value) for value in getattr(self, name)):
                raise ConfigError(f"{name}: each is sha256: and 64 lower-case hex digits.")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 0 if name in _MAY_BE_ZERO else 1e-9
            if isinstance(value, int | float) and value is not False and value < least:
                raise ConfigError(f"{name}: must be positive, not {value}.")

    @property
    def has_keys(self) -> bool:
        """Whether requests for models need a key."""
        return bool(self.api_keys or self.admin_keys or self.needs_key)


def check_pairs(first: str, second: Sequence[str], param: str) -> None:
    """Check how long the pairs of one text with each of others are in all.

    Raises:
        InvalidRequest: they have more than MAX_PAIRED characters.
    """
    characters = len(first) * len(second) + sum(map(len, second))
    if characters > MAX_PAIRED:
        raise InvalidRequest(
            f"The pairs have {characters} characters, and at most {MAX_PAIRED} are accepted.",
            param=param,
        )


def check_depth(body: bytes, param: str | None = None) -> None:
    """Check how deep the brackets of a JSON text nest.

    Raises:
        InvalidRequest: deeper than MAX_DEPTH, at which decoders fail in their own ways.
    """
    if _is_deeper(body, MAX_DEPTH):
        where = "The JSON" if param is None else f"The JSON in {param}"
        raise InvalidRequest(f"{where} is nested deeper than {MAX_DEPTH} levels.", param=param)


def _is_deeper(body: bytes, limit: int) -> bool:
    """Whether the brackets of a JSON text nest deeper than `limit`; linear, no recursion."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    left = _STRING.sub(b"", body).translate(_AS_STEPS, _NOT_BRACKETS)
    depth, steps = 0, memoryview(left).cast("b")
    for start in range(0, len(steps), _STEPS):
        part = steps[start : start + _STEPS]
        if max(accumulate(part, initial=depth)) > limit:
            return True
        depth += sum(part)
    return False
