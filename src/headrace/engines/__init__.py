"""The engines by name: which exist, which are installed, and which suits a model.

A name with a colon is an import path, `package.module:Engine`. Only configurations, flags and
programs can name one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from pydantic import ValidationError

from headrace.core.errors import ConfigError, HeadraceError, LoadFailed, OutOfMemory
from headrace.core.install import install_command
from headrace.core.model import ABILITIES, ModelFile, Task
from headrace.core.status import Footprint
from headrace.core.wording import fault_of
from headrace.engines import choice, plan
from headrace.engines.base import About, Engine, EngineOptions, OpenRequest
from headrace.engines.choice import Candidate
from headrace.engines.module import Module
from headrace.machine import graphics
from headrace.models.transfer import Progress, silent

ENTRY_POINTS = "headrace.engines"
"""The entry point group under which another package registers an engine's module."""

_SHARED = {
    *("abilities", "base", "choice", "drafting", "kept", "measured", "module", "openmp"),
    *("pictures", "plan", "remote", "speculation", "threaded", "tokenizer", "versions"),
}

PROGRAM = "executable"
"""The option that names the program of an engine that is none of Python's libraries."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an engine can be used, and if not, why and how to install it."""

    name: str
    available: bool
    reason: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]


def names() -> tuple[str, ...]:
    """Return the sorted names of all engines, built in and of other packages."""
    return tuple(sorted(_built_in() | {point.name for point in _entry_points()}))


@cache
def _built_in() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__)) - _SHARED


def about(name: str) -> About:
    """Return the facts about an engine that need no library."""
    return _module(name).ABOUT


def options(name: str) -> type[EngineOptions]:
    """Return the model of an engine's options."""
    return _module(name).Options


def status(name: str) -> EngineStatus:
    """Return whether the engine's program or library is installed, in a version that is allowed."""
    facts, program = about(name), _module(name).installed
    if program is not None:
        state = program()
        missing, reason = state.version is None, state.reason
    else:
        problem = _problem(facts)
        missing, reason = bool(problem), problem or "installed"
    return EngineStatus(
        name=name,
        available=not missing,
        reason=reason,
        formats=facts.formats,
        devices=facts.devices,
    )


def _problem(facts: About) -> str:
    """Return why an engine's library cannot be used; "" if it can."""
    if facts.requires is None:
        return ""
    if importlib.util.find_spec(facts.requires) is None:
        return f"not installed: {_install(facts)}"
    if problem := _unfit(facts.extra, facts.requires, _folders()):
        return f"installed is {problem}: {_install(facts)}"
    return ""


@lru_cache(maxsize=64)
def _unfit(extra: str | None, library: str, _folders: tuple[tuple[str, float], ...]) -> str:
    """Read the versions of packages in the folders, again after one has changed."""
    # Imported here: the process of a model needs no `packaging`.
    from headrace.engines.versions import unfit

    return unfit(extra, library)


def version(name: str) -> str | None:
    """Return the version of the engine's library, None where it has none or is not installed."""
    if (program := _module(name).installed) is not None:
        return program().version
    library = about(name).requires
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(library) if library else None
    return None


def choose(
    file: ModelFile,
    wanted: str | None = None,
    *,
    task: Task | None = None,
    device: str | None = None,
    options: Iterable[str] = (),
    able: frozenset[str] = frozenset(),
) -> tuple[str, str]:
    """Return the engine for a model, and the reason.

    `options` are the names of options that it has to know, `able` its necessary abilities.

    Raises:
        ConfigError: the engine is unknown, not installed, or does not read the format.
    """
    if wanted is not None:
        _check_choice(file, wanted, options)
        return wanted, "asked for by name"
    required = None if device in (None, "auto") else device.partition(":")[0]
    requirements = choice.Requirements(
        format=file.format,
        task=task or file.task,
        device=required or _likely_device(),
        required_device=required,
        options=frozenset(options),
        able=able,
    )
    on_cpu = requirements.device == "cpu"
    return choice.choose(requirements, (_candidate(name, on_cpu=on_cpu) for name in names()))


def describe() -> dict[str, Sequence[str]]:
    """Return lines about the engines that are programs, by name. Runs the programs."""
    described = ((name, _module(name).describe) for name in names())
    return {name: describe() for name, describe in described if describe is not None}


def _likely_device() -> str:
    """Return the kind of device that a load takes; of a GPU that only a program uses, its own."""
    if plan.has_cuda():
        return "cuda"
    if {*graphics.vendors()} <= {"apple"}:
        return "cpu"
    programs = (_module(name).devices for name in names() if status(name).available)
    kinds = (kind for devices in programs if devices is not None for kind in devices())
    return next((kind for kind in kinds if kind != "cpu"), "cpu")


def _candidate(name: str, *, on_cpu: bool) -> Candidate:
    state, facts, devices = status(name), about(name), _module(name).devices
    if devices is not None and state.available and not on_cpu:
        facts = msgspec.structs.replace(facts, devices=devices())
    return Candidate(
        name=name,
        about=facts,
        options=frozenset(_module(name).Options.model_fields),
        missing=None if state.available else state.reason,
    )


def tune_options(name: str, request: OpenRequest) -> Sequence[dict[str, Any]]:
    """Return sets of options that are worth trying beside the defaults.

    `request.max_running` is the number of concurrent requests that they are for.
    """
    return _module(name).tune_options(request)


def prepared(
    name: str,
    file: ModelFile,
    home: Path,
    options: dict[str, Any],
    progress: Progress | None = None,
) -> ModelFile:
    """Return the file that the engine loads for a model: its own, or the converted one. Blocking.

    What the options ask for is made with `progress`; without it the file may be another.

    Raises:
        LoadFailed: it needs a conversion and was not converted.
        HeadraceError: it cannot be converted as an option asks for.
    """
    return _module(name).prepared(file, home, options, progress)


def convert(name: str, file: ModelFile, home: Path, progress: Progress = silent) -> ModelFile:
    """Convert a model to the format that the engine loads, where that is another. Blocking.

    Raises:
        HeadraceError: a library is not installed, or the model cannot be converted.
    """
    return _module(name).convert(file, home, progress)


def check_able(name: str, ability: str) -> None:
    """Check that an engine has one of `core.model.ABILITIES`.

    Raises:
        ConfigError: it has not; with the engines that have it.
    """
    if ability not in about(name).able:
        having = ", ".join(other for other in names() if ability in about(other).able)
        title = ABILITIES[ability]
        raise ConfigError(f"Engine {name} has no {title}; {having} have.", param=ability)


def check_options(name: str, values: dict[str, object]) -> EngineOptions:
    """Validate options of an engine.

    Raises:
        ConfigError: naming the option and what is accepted.
    """
    model = options(name)
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        subject = f"Option {key!r}" if key else "An option"
        raise ConfigError(
            f"{subject} of engine {name}: {fault_of(first['msg'])}. "
            f"It accepts {', '.join(sorted(model.model_fields))}."
        ) from error


def footprint(name: str, request: OpenRequest) -> Footprint:
    """Estimate the memory that a load takes, without the engine's library. Blocking.

    Raises:
        ConfigError: an option is unknown or wrong.
        LoadFailed: the model's header cannot be read.
    """
    check_options(name, request.options)
    return plan.countable(plan.with_adapters(_module(name).footprint(request), request.adapters))


def writes(name: str, request: OpenRequest) -> Sequence[Path]:
    """Return the folders that a confined engine writes to beside that of temporary files."""
    return _module(name).writes(request)


def import_library(name: str) -> None:
    """Import an engine's library, unless Python has compiled it before.

    A confined process cannot keep what Python compiles, and would compile it at each load.
    """
    library = about(name).requires
    spec = importlib.util.find_spec(library) if library else None
    source = spec.origin if spec is not None and spec.origin else ""
    if source.endswith(".py") and not Path(importlib.util.cache_from_source(source)).exists():
        _engine(name)


def open_engine(name: str, request: OpenRequest) -> Engine:
    """Load a model on an engine. Blocking.

    Raises:
        ConfigError: an option is unknown or wrong, or the engine's library is missing.
        LoadFailed, OutOfMemory: the model could not be loaded.
    """
    check_options(name, request.options)
    try:
        return _engine(name)(request)
    except HeadraceError:
        raise
    except ImportError as error:
        hint = f"not installed: {_install(about(name))}"
        raise ConfigError(f"Engine {name}: {hint} ({error})") from error
    except MemoryError as error:
        raise OutOfMemory(f"Engine {name} ran out of memory while loading.") from error
    except Exception as error:
        # Any exception of the library becomes a HeadraceError.
        raise LoadFailed(
            f"Engine {name} could not load the model.", detail=f"{type(error).__name__}: {error}"
        ) from error


def _entry_points() -> metadata.EntryPoints:
    return _read_entry_points(_folders())


def _folders() -> tuple[tuple[str, float], ...]:
    return tuple((folder, _changed(folder)) for folder in sys.path)


@lru_cache(maxsize=1)
def _read_entry_points(_folders: tuple[tuple[str, float], ...]) -> metadata.EntryPoints:
    """Read the files of all packages in the folders, again after one has changed."""
    return metadata.entry_points(group=ENTRY_POINTS)


def _changed(folder: str) -> float:
    try:
        return Path(folder).stat().st_mtime
    except OSError:
        return 0.0


def folder(name: str) -> str | None:
    """Return where an engine given by its import path was found, for the path of a process."""
    if ":" not in name:
        return None
    top = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
    file = top and (top.origin or next(iter(top.submodule_search_locations or ()), None))
    if top is None or file is None:
        return None
    return str(Path(file).parents[1 if top.submodule_search_locations is not None else 0])


def _imported(name: str) -> ModuleType:
    if ":" in name:
        return _from_path(name)
    for point in _entry_points():
        if point.name == name:
            return point.load()
    if name not in _built_in():
        raise ConfigError(f"There is no engine {name!r}; there are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")


def _from_path(name: str) -> ModuleType:
    path, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        absent = f"{path}.".startswith(f"{error.name}.")
        hint = "; install it, or put its folder on PYTHONPATH" if absent else ""
        raise ConfigError(f"Engine {name!r}: {error}{hint}.", param="engine") from error
    except Exception as error:
        # The module is code of the user: anything may be wrong with it.
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"Engine {name!r} cannot be imported: {reason}", param="engine"
        ) from error
    missing = [word for word in ("ABOUT", "Options", attribute) if not hasattr(module, word or " ")]
    if missing:
        raise ConfigError(
            f"Engine {name!r}: {path} has no {' and no '.join(missing)}.", param="engine"
        )
    return module


def _module(name: str) -> Module:
    return Module.of(_imported(name))


def _engine(name: str) -> Callable[[OpenRequest], Engine]:
    module = _imported(name)
    if ":" in name:
        return getattr(module, name.partition(":")[2])
    if not hasattr(module, "Engine"):
        module = importlib.import_module(f"{module.__name__}.engine")
    return module.Engine


def _check_choice(file: ModelFile, wanted: str, options: Iterable[str]) -> None:
    state = status(wanted)
    if not state.available and PROGRAM not in options:
        raise ConfigError(f"Engine {wanted}: {state.reason}")
    if file.format not in state.formats:
        raise ConfigError(
            f"Engine {wanted} reads {', '.join(state.formats)}, not {file.format}. {_formats()}"
        )


def _formats() -> str:
    return "Formats: " + "; ".join(f"{name} {'/'.join(about(name).formats)}" for name in names())


def _install(facts: About) -> str:
    if facts.extra:
        return install_command(facts.extra)
    return install_command(package=facts.requires or "")
