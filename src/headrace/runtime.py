"""The composition root: from a configuration to a wired Backend. The only file that knows all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

from headrace import config as configuration
from headrace import engines as engine_registry
from headrace.config import Config, Settings
from headrace.core.model import ModelFile, ModelInfo, ModelSpec
from headrace.engines import EngineStatus
from headrace.log import LogSettings
from headrace.machine import SystemInfo
from headrace.machine import system as system_info
from headrace.models.inspect import inspect
from headrace.models.reference import BuiltinReference, HubReference, Reference, parse
from headrace.models.store import Store
from headrace.pool.pool import Pool
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import OnProgress, Resolve, WorkerSpec, unloaded_info
from headrace.worker.worker import Worker

_NO_FILE = ModelFile(path="", format="none")


def engine_options() -> dict[str, type[BaseModel]]:
    """Return the Options of every engine, by its name."""
    return {name: engine_registry.options(name) for name in engine_registry.names()}


def engines() -> list[EngineStatus]:
    """Tell which engines there are and which could run here."""
    return [engine_registry.status(name) for name in engine_registry.names()]


def system() -> SystemInfo:
    """Return what this machine is."""
    return system_info()


def load_settings(**sources: Any) -> Settings:
    """Read the configuration; the arguments are those of `headrace.config.load`.

    Raises:
        ConfigError: something in it is wrong.
    """
    return configuration.load(known_options=engine_options(), **sources)


def store(config: Config) -> Store:
    """Open the store of models."""
    return Store(config.home)


def resolver(config: Config) -> Resolve:
    """Return the function that finds a model's file and its engine; it downloads and blocks."""

    def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        return _worker_spec(spec, store(config).model_file(_reference(spec), on_progress))

    return resolve


def describe(spec: ModelSpec, config: Config) -> ModelInfo:
    """Tell about a model without loading it: the engine and why, and its header if it is here.

    Raises:
        HeadraceError: the reference is wrong, the file is bad, or no engine can run it.
    """
    reference = _reference(spec)
    if isinstance(reference, BuiltinReference):
        return unloaded_info(spec, "created", None, _worker_spec(spec, _NO_FILE))
    stored = store(config).find(reference)
    if stored is None:
        return unloaded_info(spec, "created", "not downloaded yet")
    found = _worker_spec(spec, inspect(Path(stored.path)))
    return unloaded_info(spec, "created", None, found)


def open_worker(
    spec: ModelSpec,
    config: Config,
    *,
    isolate: bool = True,
    on_progress: OnProgress | None = None,
) -> WorkerProcess | Worker:
    """Bind a model to a worker that is not started, in a process of its own or in this one."""
    resolve, logs = resolver(config), log_settings(config)
    if not isolate:
        return Worker(spec, resolve, on_progress=on_progress, log_content=logs.content)
    return WorkerProcess(spec, resolve, on_progress=on_progress, log_settings=logs)


def open_backend(settings: Settings, models: Sequence[ModelSpec]) -> Pool:
    """Bind many models to one Backend; nothing is loaded yet."""
    resolve, logs = resolver(settings.config), log_settings(settings.config)
    return Pool(models, lambda spec: WorkerProcess(spec, resolve, log_settings=logs))


def log_settings(config: Config) -> LogSettings:
    """Return what the log is configured to be."""
    return LogSettings(level=config.log_level, style=config.log_format, content=config.log_content)


def _reference(spec: ModelSpec) -> Reference:
    reference = parse(spec.model)
    if isinstance(reference, HubReference) and spec.revision is not None:
        return msgspec.structs.replace(reference, revision=spec.revision)
    return reference


def _worker_spec(spec: ModelSpec, file: ModelFile) -> WorkerSpec:
    engine, reason = engine_registry.choose(file, spec.engine)
    engine_registry.check_options(engine, spec.options)
    return WorkerSpec(model=spec, file=file, engine=engine, engine_reason=reason)
