"""The composition root: builds Backends from a configuration. It alone imports all packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import BaseModel

from headrace import checks, machine, measurements
from headrace import config as configuration
from headrace import engines as engine_registry
from headrace.cluster.local import NodePool, NodePoolAdmin
from headrace.config import Config, Settings
from headrace.core import confine
from headrace.core import parameters as core_parameters
from headrace.core.errors import ConfigError
from headrace.core.model import ModelFile, ModelInfo, ModelSpec
from headrace.core.parameters import Parameter
from headrace.core.private import close_to_others
from headrace.core.status import Plan
from headrace.engines import EngineStatus, measured, speculation
from headrace.keys.keeper import Keeper
from headrace.listing import list_library
from headrace.log import LogSettings
from headrace.machine import SystemInfo
from headrace.models import adapter, library
from headrace.models.inspect import inspect
from headrace.models.providers import PROVIDERS, Provider
from headrace.models.reference import (
    CATALOG,
    HubReference,
    LocalReference,
    Reference,
    in_library,
    is_remote,
    parse,
)
from headrace.models.store import Store, without_file
from headrace.placement import check_devices, placement
from headrace.pool.admin import PoolAdmin, Shown, Specify, Wanted
from headrace.pool.ledger import Ledger
from headrace.pool.plan import plan_load
from headrace.pool.pool import Pool
from headrace.pool.state import StateFile
from headrace.pool.worker import PooledWorker
from headrace.telemetry import otel
from headrace.text import renderer
from headrace.text.template import ChatTemplate
from headrace.worker.chat import format_of
from headrace.worker.process import Spawn, WarmProcess, WorkerProcess, spawn
from headrace.worker.sizing import Sizing, Unsized
from headrace.worker.spec import OnProgress, Resolve, WorkerSpec, described, unloaded_info
from headrace.worker.worker import Worker

if TYPE_CHECKING:
    from headrace.telemetry.telemetry import Telemetry


Reread = Callable[[], tuple[Settings, Sequence[ModelSpec]]]
"""Reads the configuration again; returns it and the models to serve."""


def engine_options() -> dict[str, type[BaseModel]]:
    """Return the Options of every engine, by its name."""
    return {name: engine_registry.options(name) for name in engine_registry.names()}


def engines() -> list[EngineStatus]:
    """Return the engines, and whether they can run on this machine."""
    return [engine_registry.status(name) for name in engine_registry.names()]


def programs() -> dict[str, Sequence[str]]:
    """Return what the programs of engines report of themselves, as lines, by engine. Runs them."""
    return engine_registry.describe()


def providers() -> Mapping[str, Provider]:
    """Return the named upstreams."""
    return PROVIDERS


def system() -> SystemInfo:
    """Return the facts of this machine."""
    return machine.system()


def confinement() -> dict[str, str]:
    """Return what this system can take from the process of a model."""
    return confine.abilities()


def load_settings(**sources: Any) -> Settings:
    """Read the configuration; the arguments are those of `headrace.config.load`.

    Raises:
        ConfigError: the configuration is invalid.
    """
    settings = configuration.load(
        known_options=engine_options(),
        import_options=engine_registry.options,
        verify=checks.verify,
        **sources,
    )
    library.use(settings.config.home)
    return settings.with_upstreams(PROVIDERS)


def store(config: Config) -> Store:
    """Return the store of models."""
    return Store(config.home)


def model_file(spec: ModelSpec, config: Config, on_progress: OnProgress) -> ModelFile:
    """Return a model's file, downloaded if needed. Blocking.

    Raises:
        HeadraceError: the reference is invalid, or the download failed.
    """
    return store(config).model_file(_reference(spec), on_progress)


def resolver(config: Config) -> Resolve:
    """Return a function that finds a model's file and engine; it downloads, and blocks."""

    def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        file = model_file(spec, config, on_progress)
        worker_spec = _worker_spec(spec, file, config, on_progress)
        adapters = adapter.fetched(spec.adapters, file, store(config), on_progress)
        draft = speculation.fetched(spec.options, file, store(config), on_progress)
        return msgspec.structs.replace(worker_spec, adapters=tuple(adapters), draft=draft)

    return resolve


def _library_spec(config: Config) -> Callable[[ModelSpec], WorkerSpec | None]:
    """Return a function that describes a model of the library that was not downloaded."""

    def describe(spec: ModelSpec) -> WorkerSpec | None:
        model = in_library(spec.model)
        if model is None or store(config).find(_reference(spec)) is not None:
            return None
        return _worker_spec(spec, model.file, config)

    return describe


def parameters(spec: ModelSpec, engine: str) -> tuple[Parameter, ...]:
    """Return the settings of a model and the options of its engine; `auto` has none yet."""
    settings = core_parameters.settings(spec)
    if engine == "auto":
        return tuple(settings)
    schema = engine_registry.options(engine).model_json_schema()
    return (*settings, *core_parameters.options(schema, spec.options))


def describe(spec: ModelSpec, config: Config) -> ModelInfo:
    """Return the metadata of a model without loading it, with its header if it is downloaded.

    Raises:
        HeadraceError: the reference or file is invalid, or no engine can run it.
    """
    reference = _reference(spec)
    if (file := without_file(reference)) is not None:
        return unloaded_info(spec, "created", None, _worker_spec(spec, file, config))
    if isinstance(reference, LocalReference):
        path: Path | None = store(config).fetch(reference)
    else:
        path = Path(stored.path) if (stored := store(config).find(reference)) else None
    if path is None:
        entry = CATALOG.get(spec.model)
        known = msgspec.structs.replace(spec, task=spec.task or (entry.task if entry else None))
        name = spec.name if spec.name in config.models else spec.model
        return unloaded_info(
            known, "created", f"not downloaded yet; `headrace pull {name}` does it"
        )
    worker_spec = _worker_spec(spec, inspect(path), config)
    return unloaded_info(spec, "created", None, worker_spec)


def with_tool_format(info: ModelInfo, spec: ModelSpec) -> ModelInfo:
    """Return metadata with how the model writes thinking and calls, by its template. Blocking."""
    if info.chat_template is None or "generate" not in info.capabilities.tasks:
        return info
    try:
        template = ChatTemplate(info.chat_template, {})
        return described(info, format_of(template, spec.tool_format))
    except ConfigError:
        return info
    finally:
        # Each model has a process that renders; this one needs none any more.
        renderer.end_idle()


def open_worker(
    spec: ModelSpec,
    config: Config,
    *,
    resolve: Resolve | None = None,
    isolate: bool = True,
    on_progress: OnProgress | None = None,
    spawn: Spawn = spawn,
) -> WorkerProcess | Worker:
    """Return a worker for a model, not started, in a process of its own or in this one."""
    resolve, logs = resolve or resolver(config), log_settings(config)
    if is_remote(spec.model) or not isolate:
        return Worker(spec, resolve, on_progress=on_progress, log_content=logs.content)
    return WorkerProcess(
        spec,
        resolve,
        on_progress=on_progress,
        log_settings=logs,
        spawn=spawn,
        confine=config.server.confine == "auto",
    )


def open_pool_of_one(
    spec: ModelSpec,
    config: Config,
    *,
    isolate: bool = True,
    on_progress: OnProgress | None = None,
) -> Pool:
    """Return a pool for one model, without a memory budget, that keeps it until it is closed."""
    resolve = resolver(config)

    def make_worker(spec: ModelSpec, report: OnProgress) -> PooledWorker:
        def progress(stage: str, done: int, total: int) -> None:
            report(stage, done, total)
            if on_progress is not None:
                on_progress(stage, done, total)

        return open_worker(spec, config, resolve=resolve, isolate=isolate, on_progress=progress)

    kept = msgspec.structs.replace(
        spec, keep_alive=-1.0, replicas=1, preload=True, enabled=True, pinned=True
    )
    return Pool([kept], make_worker, sizing=Unsized(), ledger=Ledger({}, dict))


def open_pool(settings: Settings, models: Sequence[ModelSpec], *, is_node: bool = False) -> Pool:
    """Return a pool of models with one memory budget; nothing is loaded yet.

    Raises:
        ConfigError: the budget does not fit this machine.
    """
    config = settings.config
    check_devices(models)
    budgets = _budgets(config)
    sizing = Sizing(resolver(config), config.home / "measured.json", budgets, _library_spec(config))
    warm = WarmProcess()

    def make_worker(spec: ModelSpec, report: OnProgress) -> PooledWorker:
        return open_worker(
            spec, config, resolve=sizing.resolve, on_progress=report, spawn=warm.take
        )

    return (NodePool if is_node else Pool)(
        models,
        make_worker,
        sizing=sizing,
        ledger=Ledger(budgets, _memory),
        rules=config.server,
        warm=warm,
    )


def open_service(
    settings: Settings, models: Sequence[ModelSpec], *, reread: Reread, is_node: bool = False
) -> tuple[PoolAdmin, Telemetry]:
    """Return a pool with its Admin, and its telemetry; of a node, the Admin is a NodePoolAdmin.

    Changes in the state file are applied. `reread` reads the configuration for a reload.

    Raises:
        ConfigError: the budget does not fit this machine, or another service uses the state file.
    """
    # Imported here: commands without a service do not need its libraries.
    from headrace.telemetry.telemetry import Telemetry

    config = settings.config
    close_to_others(config.home)
    tracing = otel.configure()
    admin = (NodePoolAdmin if is_node else PoolAdmin)(
        open_pool(settings, models, is_node=is_node),
        specify=_specify(settings, models),
        state=StateFile(config.state_file),
        reread=lambda: _reread(settings, *reread()),
        drain_s=config.server.drain_s,
        shown=Shown(
            stored=store(config).summaries,
            measurements=lambda: measurements.read(config.home),
            describe=lambda spec: with_tool_format(describe(spec, config), spec),
            library=lambda loader, specify, wanted: list_library(
                loader, config.home, lambda name: specify(name, {}), wanted
            ),
        ),
    )
    admin.restore()
    return admin, Telemetry(
        admin, tracing, config.telemetry, config.home, config.server.database or ""
    )


def open_keys(config: Config) -> Keeper:
    """Return the keys of a service in their database; nothing is read yet."""
    server = config.server
    return Keeper(server.database or "", config.home, server.database_down)


async def plan(settings: Settings, spec: ModelSpec) -> Plan:
    """Return what a load would need on this machine if nothing were loaded.

    A model of the library that was not downloaded is estimated from what the library knows.

    Raises:
        UnknownModel: the model is not on this machine, and not in the library.
        HeadraceError: it is damaged, or no engine can run it.
    """
    loader = open_pool(settings, [spec]).loader
    return await plan_load(loader.memory, loader.sizing, spec)


def _reread(before: Settings, settings: Settings, specs: Sequence[ModelSpec]) -> Wanted:
    check_devices(specs)
    return Wanted(
        specs=tuple(specs),
        rules=settings.config.server,
        budgets=_budgets(settings.config),
        specify=_specify(settings, specs),
        drain_s=settings.config.server.drain_s,
        needs_restart=before.needs_restart(settings),
    )


def _specify(settings: Settings, specs: Sequence[ModelSpec]) -> Specify:
    def specify(name: str, changes: Mapping[str, Any]) -> ModelSpec:
        spec = settings.changed(name, changes, specs)
        check_devices([spec])
        return spec

    return specify


def _memory() -> dict[str, tuple[int, int]]:
    return {device.key: (device.total, device.total - device.used) for device in machine.devices()}


def _budgets(config: Config) -> dict[str, int]:
    return machine.budgets(config.server.memory, machine.devices())


def log_settings(config: Config) -> LogSettings:
    """Return the configuration of the log."""
    return LogSettings(level=config.log_level, style=config.log_format, content=config.log_content)


def _reference(spec: ModelSpec) -> Reference:
    reference = parse(spec.model)
    if isinstance(reference, HubReference) and spec.revision is not None:
        return msgspec.structs.replace(reference, revision=spec.revision)
    return reference


def _engine(spec: ModelSpec, file: ModelFile, config: Config) -> tuple[str, str]:
    if file.provider is None or spec.engine is not None:
        name, reason = engine_registry.choose(
            file,
            spec.engine,
            task=spec.task,
            device=spec.device,
            options=spec.options,
            able=frozenset({"adapters"} if spec.adapters else ()),
        )
        is_automatic = spec.engine is None
        return name, reason + (measured.proposal(config.home, file, name) if is_automatic else "")
    provider = PROVIDERS[file.provider]
    engine, _ = engine_registry.choose(file, provider.engine)
    return engine, f"{provider.title} speaks its protocol"


def _worker_spec(
    spec: ModelSpec, file: ModelFile, config: Config, progress: OnProgress | None = None
) -> WorkerSpec:
    engine, reason = _engine(spec, file, config)
    engine_registry.check_options(engine, spec.options)
    file = engine_registry.prepared(engine, file, config.home, spec.options, progress)
    return WorkerSpec(
        model=spec,
        placed=placement(spec, engine),
        file=file,
        engine=engine,
        engine_reason=reason,
        import_from=engine_registry.folder(engine),
    )
