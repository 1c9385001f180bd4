"""The composition root: from a configuration to a wired Backend. The only file that knows all."""

from __future__ import annotations

from collections.abc import Sequence
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
    found = _worker_spec(spec, inspect(stored.path))
    return unloaded_info(spec, "created", None, found)


def open_worker(
    spec: ModelSpec,
    config: Config,
    *,
    isolate: bool = True,
    on_progress: OnProgress | None = None,
) -> WorkerProcess | Worker:
    """Bind a model to a worker that is not started, in a process of its own or in this one."""
    resolve = resolver(config)
    if not isolate:
        return Worker(spec, resolve, on_progress=on_progress)
    settings: LogSettings = (config.log_level, config.log_format)
    return WorkerProcess(spec, resolve, on_progress=on_progress, log_settings=settings)


def open_backend(settings: Settings, models: Sequence[ModelSpec]) -> Pool:
    """Bind many models to one Backend; nothing is loaded yet."""
    config = settings.config
    log_settings: LogSettings = (config.log_level, config.log_format)
    return Pool(
        models, lambda spec: WorkerProcess(spec, resolver(config), log_settings=log_settings)
    )


def _reference(spec: ModelSpec) -> Reference:
    reference = parse(spec.model)
    if isinstance(reference, HubReference) and spec.revision is not None:
        return msgspec.structs.replace(reference, revision=spec.revision)
    return reference


def _worker_spec(spec: ModelSpec, file: ModelFile) -> WorkerSpec:
    engine, reason = engine_registry.choose(file, spec.engine)
    engine_registry.check_options(engine, spec.options)
    return WorkerSpec(model=spec, file=file, engine=engine, engine_reason=reason)
