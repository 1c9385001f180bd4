"""llama.cpp by any executable of its server, such as one built for the GPU of this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import Field, field_validator

from headrace.core.errors import HeadraceError
from headrace.core.status import Footprint
from headrace.engines import llamacpp, plan
from headrace.engines.base import About, OpenRequest
from headrace.engines.llama_server import executables
from headrace.engines.module import Installed
from headrace.machine import graphics

ABOUT = About(
    formats=("gguf",),
    devices=(*llamacpp.ABOUT.devices, "sycl"),
    confined=True,
    program=True,
    spreads=True,
    tasks=("generate", "embed", "rerank"),
    able=llamacpp.ABOUT.able,
)

_MANAGED = re.compile(
    r"--?(?:h|m|mu|hf\w*|c|np|b|ub|ngl|host|port|path|api-\S+|ssl-\S+|cors-\S+|tools\S*|mcp-\S+|agent"
    r"|ag|spec-type|spec-draft-(?:model|hf|n-max)|md|model-draft|hfd|hfrd|hf-repo-draft|models?\S*|hf-\S+|docker-repo|dr|ctx-size|parallel|\S*batch-size|\S*webui\S*|\S*ui\S*|slots"
    r"|slot-save-path|media-path|log-\S+|lv|v|verbose|verbosity|props|metrics|rpc|embeddings?"
    r"|rerank\S*|pooling|version|help|usage|list-devices|cache-list|cl)(?:=.*)?"
)
"""Arguments that Headrace sets itself, or that would open what it keeps closed."""

# Measured with SmolLM2-135M: the process that talks to the server, beside it.
_OWN_PROCESS = 40 << 20


class Options(llamacpp.Options):
    """Settings of llama.cpp's server. All are fixed once the model is loaded."""

    executable: str | None = Field(
        None,
        description="The server's executable, by its path or its name on PATH; by default "
        "`llama-server`, of several the first that has a GPU where there is one.",
    )
    arguments: tuple[str, ...] = Field(
        (),
        description="Further arguments of the executable, as `llama-server --help` lists them.",
    )

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        if managed := next(filter(_MANAGED.fullmatch, arguments), None):
            raise ValueError(f"{managed} may not be given: Headrace sets it, or keeps it off")
        return arguments


prepared = llamacpp.prepared


def installed() -> Installed:
    """Return which executable is there, or how to get one."""
    paths = executables.search()
    if not paths:
        return Installed(reason=f"not installed: {executables.advice()}")
    return Installed(version=executables.version(paths[0]), reason=str(paths[0]))


def describe() -> Sequence[str]:
    """Return each executable with its build and its devices, and what would use a GPU. Runs them.

    The advice comes where the machine has a GPU that none of them uses.
    """
    paths = executables.search()
    idle = graphics.vendors() and not any(executables.examined(path).devices for path in paths)
    advice = f"a build for the GPU of this machine: {executables.advice()}"
    return [*map(executables.described, paths), *([advice] if idle else [])]


def devices() -> tuple[str, ...]:
    """Return the kinds of devices that the preferred executable has. Runs it."""
    program = executables.preferred()
    return ("cpu", *(program.kinds if program else ()))


def tune_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return options worth trying, which are those of llama.cpp in process."""
    return llamacpp.tune_options(request)


def footprint(request: OpenRequest) -> Footprint:
    """Estimate what loading takes, from the file's header, the options and the executable.

    Raises:
        LoadFailed: the header cannot be read.
    """
    options = llamacpp.settled(request, Options)
    need = llamacpp.footprint_on(request, options, expected_device(request))
    host = need.devices["cpu"] + _OWN_PROCESS
    parts = need.parts | {"overhead": need.parts["overhead"] + _OWN_PROCESS}
    return msgspec.structs.replace(need, devices=need.devices | {"cpu": host}, parts=parts)


def expected_device(request: OpenRequest) -> str:
    """Return the device that a load will most likely take, by the executable's devices."""
    device = plan.expected_device(request.device)
    if device == "cpu" or request.device != "auto":
        return device
    try:
        program = executables.chosen(Options(**request.options).executable)
    except HeadraceError:
        return device
    return device if "cuda" in program.kinds else "cpu"
