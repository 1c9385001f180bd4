"""What the module of an engine may have: `Module` lists it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import About, EngineOptions, OpenRequest
from headrace.models import transfer


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """The program of an engine that is no Python library; `version` is None without one.

    `reason` is where it is, or else how to install it.
    """

    reason: str
    version: str | None = None


def default_footprint(request: OpenRequest) -> Footprint:
    """Return the size of the files and a tenth."""
    size = request.model.size
    overhead = size // 10
    devices = {"cpu": size + overhead}
    if request.device.startswith("cuda"):
        gpus = request.gpus or ("cuda:0",)
        devices = dict.fromkeys(gpus, (size + overhead) // len(gpus))
    return Footprint(
        devices=devices,
        parts={"weights": size, "overhead": overhead},
        context_length=request.context_length or request.model.context_length,
        max_running=request.max_running,
    )


def _no_options(request: OpenRequest) -> Sequence[dict[str, Any]]:
    del request
    return ()


def _no_folders(request: OpenRequest) -> Sequence[Path]:
    del request
    return ()


def _unchanged(file: ModelFile, *_: object) -> ModelFile:
    return file


@dataclass(frozen=True, kw_only=True)
class Module:
    """The names in an engine's module; only the first two have no default.

    `footprint` estimates the memory of a load, `tune_options` returns sets of options that are
    worth trying beside the defaults. An engine that loads a model in another format than it comes
    in makes it once with `convert` and finds it with `prepared(file, home, options, progress)`,
    which makes what an option asks for, unless progress is None. `writes` returns the folders that
    a `confined` engine writes to beside that of temporary files. One that is no Python library
    has `installed` in place of `ABOUT.requires`, `devices` with the kinds that it has here, and
    `describe` with lines about it for `doctor`. All of them may block.
    """

    ABOUT: About
    Options: type[EngineOptions]
    footprint: Callable[[OpenRequest], Footprint] = default_footprint
    tune_options: Callable[[OpenRequest], Sequence[dict[str, Any]]] = _no_options
    prepared: Callable[..., ModelFile] = _unchanged
    convert: Callable[[ModelFile, Path, transfer.Progress], ModelFile] = _unchanged
    writes: Callable[[OpenRequest], Sequence[Path]] = _no_folders
    installed: Callable[[], Installed] | None = None
    devices: Callable[[], tuple[str, ...]] | None = None
    describe: Callable[[], Sequence[str]] | None = None

    @classmethod
    def of(cls, module: ModuleType) -> Module:
        """Read a module."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(module).items() if name in names})
