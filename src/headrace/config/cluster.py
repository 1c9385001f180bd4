"""The table `[cluster]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from headrace.config.fields import Fixed, Frozen, Words, host_text, words


class ClusterSettings(Frozen):
    """The table `[cluster]`: nodes that hold models, and fronts that route to them."""

    nodes: Fixed[Words] = Field(default=(), description="addresses of nodes for a front, HOST:PORT")
    dns: Fixed[str | None] = Field(
        default=None, description="name whose addresses are nodes, as headrace-nodes:11512"
    )
    ray: Fixed[str | None] = Field(
        default=None, description="address of the head of a Ray cluster that places nodes"
    )
    ray_port: Fixed[int] = Field(
        default=11513, gt=0, le=65535, description="port beside Ray's head that lists the nodes"
    )
    orphan_s: Fixed[float] = Field(
        default=600.0, gt=0, description="time after which a node ends that Ray has left alone"
    )
    node_name: Fixed[str | None] = Field(
        default=None, min_length=1, max_length=64, description="name of this node; the host's name"
    )
    labels: Fixed[Words] = Field(
        default=(), description="labels of this node, that models name in `nodes`"
    )
    wire_host: Fixed[Annotated[str, AfterValidator(host_text)]] = Field(
        default="127.0.0.1", description="address on which a node listens for fronts"
    )
    wire_port: Fixed[int] = Field(
        default=11512, ge=0, le=65535, description="port on which a node listens for fronts"
    )
    token_file: Fixed[Path | None] = Field(
        default=None, description="file with the secret that nodes and fronts share"
    )
    tls: Fixed[Annotated[dict[str, Path] | None, BeforeValidator(words)]] = Field(
        default=None, description="files of TLS: {cert, key, ca}, with an authority of its own"
    )
    heartbeat_s: Fixed[float] = Field(
        default=0.5, gt=0, description="time between messages of a connection without others"
    )
    silence_s: Fixed[float] = Field(
        default=2.0, gt=0, description="silence after which a node counts as gone"
    )

    @field_validator("tls")
    @classmethod
    def _files(cls, files: dict[str, Path] | None) -> dict[str, Path] | None:
        if files is not None and set(files) != {"cert", "key", "ca"}:
            raise ValueError("needs cert, key and ca, and nothing else")
        return files

    @field_validator("silence_s")
    @classmethod
    def _longer(cls, silence_s: float, info: ValidationInfo) -> float:
        if silence_s < 2 * info.data.get("heartbeat_s", 0.0):
            raise ValueError("is at least twice heartbeat_s")
        return silence_s
