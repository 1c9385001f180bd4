"""Models of upstreams with OpenAI's protocol, over pooled HTTP connections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from headrace.engines import remote
from headrace.engines.base import About
from headrace.engines.remote import RemoteOptions

ABOUT = About(
    formats=("remote",),
    devices=("remote",),
    tasks=("generate", "embed", "rerank"),
    remote=True,
    able=frozenset({"forms", "json_schema", "logprobs", "vision", "audio"}),
)
_FIELD = r"^[a-z_]{1,32}$"


class Options(RemoteOptions):
    """Options of a model at an upstream; some override the table of providers."""

    api_version: str | None = Field(
        None, pattern=r"^[\w.-]{1,64}$", description="`api-version` of Azure's older addresses."
    )
    sampling: tuple[Annotated[str, Field(pattern=_FIELD)], ...] | None = Field(
        None,
        max_length=32,
        description="Sampling fields (and `n`) that the upstream honours, in place of the table's.",
    )


footprint = remote.footprint
