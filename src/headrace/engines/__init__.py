"""The engines by name: which there are, which could run here, and which suits a model."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from importlib import metadata
from types import ModuleType

import msgspec
from pydantic import ValidationError

from headrace.core.errors import ConfigError, HeadraceError, LoadFailed, OutOfMemory
from headrace.core.model import ModelFile
from headrace.core.status import Footprint
from headrace.engines.base import About, Engine, EngineOptions, OpenRequest

ENTRY_POINTS = "headrace.engines"
"""The entry point group under which another package registers an engine's module."""

_SHARED = {"base", "threaded", "openmp"}


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an engine could run here, and if not, what to do about it."""

    name: str
    available: bool
    reason: str
    formats: tuple[str, ...]
    devices: tuple[str, ...]


def names() -> tuple[str, ...]:
    """Return the names of all engines, our own and those of other packages, sorted."""
    ours = {module.name for module in pkgutil.iter_modules(__path__)} - _SHARED
    # llamacpp_call is a part of llamacpp.
    engines = {name for name in ours if not any(name.startswith(f"{other}_") for other in ours)}
    return tuple(sorted(engines | {point.name for point in _entry_points()}))


def about(name: str) -> About:
    """Return what is known of an engine without its library."""
    return _module(name).ABOUT


def options(name: str) -> type[EngineOptions]:
    """Return the model of an engine's options."""
    return _module(name).Options


def status(name: str) -> EngineStatus:
    """Tell whether the engine's library is installed."""
    facts = about(name)
    missing = facts.requires is not None and importlib.util.find_spec(facts.requires) is None
    return EngineStatus(
        name=name,
        available=not missing,
        reason=_install_hint(facts) if missing else "installed",
        formats=facts.formats,
        devices=facts.devices,
    )


def version(name: str) -> str | None:
    """Return the version of the engine's library, None where it has none or is not installed."""
    library = about(name).requires
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(library) if library else None
    return None


def choose(file: ModelFile, wanted: str | None = None) -> tuple[str, str]:
    """Return the engine for a model, and why it.

    Raises:
        ConfigError: the engine is unknown, not installed, or does not read the format.
    """
    if wanted is not None:
        _check_choice(file, wanted)
        return wanted, "asked for by name"
    able = [status(name) for name in names() if file.format in about(name).formats]
    for candidate in able:
        if candidate.available:
            return candidate.name, f"the first installed engine that reads {file.format}"
    known = "; ".join(f"{one.name}: {one.reason}" for one in able) or _formats()
    raise ConfigError(f"No engine here can run a model in the format {file.format}. {known}")


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
        raise ConfigError(
            f"Option {key!r} of engine {name}: {first['msg']}. "
            f"It accepts {', '.join(sorted(model.model_fields))}."
        ) from error


def footprint(name: str, request: OpenRequest) -> Footprint:
    """Estimate the memory that a load takes, without the engine's library. Blocking.

    Raises:
        ConfigError: an option is unknown or wrong.
        LoadFailed: the model's header cannot be read.
    """
    check_options(name, request.options)
    own = getattr(_module(name), "footprint", None)
    if own is not None:
        return own(request)
    size = request.model.size
    overhead = size // 10
    return Footprint(
        devices={"cuda:0" if request.device.startswith("cuda") else "cpu": size + overhead},
        parts={"weights": size, "overhead": overhead},
        context_length=request.context_length or request.model.context_length,
        max_running=request.max_running,
    )


def open_engine(name: str, request: OpenRequest) -> Engine:
    """Load a model on an engine. Blocking.

    Raises:
        ConfigError: an option is unknown or wrong, or the engine's library is missing.
        LoadFailed, OutOfMemory: the model could not be loaded.
    """
    check_options(name, request.options)
    try:
        return _module(name).Engine(request)
    except HeadraceError:
        raise
    except ImportError as error:
        raise ConfigError(f"Engine {name}: {_install_hint(about(name))} ({error})") from error
    except MemoryError as error:
        raise OutOfMemory(f"Engine {name} ran out of memory while loading.") from error
    except Exception as error:
        # Whatever the library raised, the model is not there: say so in our own terms.
        raise LoadFailed(
            f"Engine {name} could not load the model.", detail=f"{type(error).__name__}: {error}"
        ) from error


def _entry_points() -> metadata.EntryPoints:
    return metadata.entry_points(group=ENTRY_POINTS)


def _module(name: str) -> ModuleType:
    if name not in names():
        raise ConfigError(f"There is no engine {name!r}; there are {', '.join(names())}.")
    for point in _entry_points():
        if point.name == name:
            return point.load()
    return importlib.import_module(f"{__name__}.{name}")


def _check_choice(file: ModelFile, wanted: str) -> None:
    found = status(wanted)
    if not found.available:
        raise ConfigError(f"Engine {wanted}: {found.reason}")
    if file.format not in found.formats:
        raise ConfigError(
            f"Engine {wanted} reads {', '.join(found.formats)}, not {file.format}. {_formats()}"
        )


def _formats() -> str:
    return "Formats: " + "; ".join(f"{name} {'/'.join(about(name).formats)}" for name in names())


def _install_hint(facts: About) -> str:
    extra = f"headrace[{facts.extra}]" if facts.extra else facts.requires
    return f"not installed: pip install '{extra}'"
