"""The table `[dbgpt]`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from headrace.config.fields import Fixed, Frozen, Words, lower, plain_host


def _urls(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"{value!r} is not http://HOST:PORT")
    return tuple(value.rstrip("/") for value in values)


def _reachable(value: str | None) -> str | None:
    if value is not None:
        parts = urlsplit(f"//{value}")
        if not parts.hostname or parts.path or parts.port == 0:
            raise ValueError(f"{value!r} is not HOST or HOST:PORT")
    return value


class DbgptSettings(Frozen):
    """The table `[dbgpt]`: the cluster whose worker this service is.

    Outside of the table its keys begin with `dbgpt_`: HEADRACE_DBGPT_PORT.
    """

    prefix: ClassVar[str] = "dbgpt_"

    controller: Fixed[Annotated[Words, AfterValidator(_urls)]] = Field(
        default=(), description="controllers to register at: http://HOST:PORT, ..."
    )
    host: Fixed[Annotated[str, AfterValidator(plain_host)]] = Field(
        default="127.0.0.1", description="address of the routes for the cluster"
    )
    port: Fixed[int] = Field(
        default=8001, ge=0, le=65535, description="their port; 0 takes a free one"
    )
    advertise: Fixed[Annotated[str | None, AfterValidator(_reachable)]] = Field(
        default=None, description="address that is registered, HOST or HOST:PORT"
    )
    heartbeat_s: Fixed[float] = Field(
        default=20.0, gt=0, le=60, description="time between two heartbeats"
    )
    without_key: Fixed[Annotated[Literal["refuse", "use", "manage"], BeforeValidator(lower)]] = (
        Field(
            default="refuse",
            description="what DB-GPT, which sends no key, may do: refuse, use, manage",
        )
    )
