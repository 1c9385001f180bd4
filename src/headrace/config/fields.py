"""Types of settings, what reads them from text, and settings that need a restart."""

from __future__ import annotations

import ipaddress
import json
from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict


def words(value: object) -> object:
    """Read text as JSON or as words separated by commas; the environment has no lists."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return json.loads(value)
    return [word.strip() for word in value.split(",") if word.strip()]


def lower(value: object) -> object:
    """Return text in lower case."""
    return value.lower() if isinstance(value, str) else value


def host_text(value: str) -> str:
    """Return an address as the system writes it; one of IPv6 may be in the brackets of a URL."""
    name = value.strip().removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


T = TypeVar("T")
FIXED = "fixed"

Fixed = Annotated[T, FIXED]
"""A setting that a running service cannot change; it needs a restart."""

Words = Annotated[tuple[str, ...], BeforeValidator(words)]


class Frozen(BaseModel):
    """A table of settings; outside of it, its keys begin with `prefix`."""

    # Inputs are kept out of errors: one may be a secret.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        defer_build=True,
    )

    prefix: ClassVar[str] = ""
