"""One frozen settings tree: default < file < environment < flag < argument.

Every value knows its origin; `load` reads the sources, `Settings` answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from headrace.config import check, sources
from headrace.config.sources import File, Keys, Layer, Value, environment_name, short_name
from headrace.config.tree import (
    TABLES,
    Config,
    ModelSettings,
    ServerSettings,
    TelemetrySettings,
    hash_key,
)
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec
from headrace.core.secrets import masked

__all__ = [
    "Config",
    "ModelSettings",
    "Row",
    "ServerSettings",
    "Settings",
    "TelemetrySettings",
    "environment_name",
    "hash_key",
    "load",
    "short_name",
]


class Row(NamedTuple):
    """One line of `headrace config show`; `value` is JSON, masked where it is a secret."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class _Sources:
    """All layers, as they were read."""

    file: File
    environment: Mapping[str, Layer]
    flags: Layer
    keys: Keys
    engines: Mapping[str, type[BaseModel]]
    cwd: Path

    def everywhere(self, default: Layer) -> Layer:
        """Merge what is set for the whole program."""
        layer = default | self.file.shared
        for source in (self.environment[""], self.flags):
            layer |= {key: value for key, value in source.items() if not key.startswith("*.")}
        return layer

    def of_model(self, name: str, reference: str, given: Layer) -> Layer:
        """Merge what is set for one model, options of other engines left out."""
        layer = {"model": Value(reference, "default", self.cwd)} | self.file.models.get(name, {})
        variables = self.environment.get(environment_name(name), {})
        shared = _for_all(self.environment[""])
        merged = layer | shared | variables | _for_all(self.flags) | given
        able = {key for kind in self.able(merged) for key in kind.model_fields}
        for key in shared:
            option = key.removeprefix("options.")
            # A variable for all models speaks to those whose engine has the option.
            if key != option and option not in able and merged[key] is shared[key]:
                del merged[key]
        return merged

    def able(self, layer: Layer) -> list[type[BaseModel]]:
        """Return the options of the model's engine, or of all engines while it is not known.

        Raises:
            ConfigError: no such engine.
        """
        named = layer.get("engine")
        if named and named.value == "auto":
            named = None
        engine = named.value if named else str(layer["model"].value).removeprefix("builtin:")
        if engine in self.engines:
            return [self.engines[engine]]
        # An engine by import path is not in the list, and checks its options when it opens.
        if named and self.engines and ":" not in str(engine):
            raise sources.unknown_key(named.origin, str(engine), self.engines, "engine")
        return [] if named else list(self.engines.values())


def _for_all(layer: Layer) -> Layer:
    return {key[2:]: value for key, value in layer.items() if key.startswith("*.")}


@dataclass(frozen=True)
class Settings:
    """The configuration, and where each value of it comes from.

    `file` is the one that was read, `searched` the places where one was looked for.
    """

    config: Config
    file: Path | None
    searched: tuple[Path, ...]
    # Secrets are in there as they were written.
    _sources: _Sources = field(repr=False)

    def origin(self, key: str) -> str:
        """Tell where a value comes from: `default`, `file ...`, `environment ...`, `flag ...`.

        `key` is as in `show`: `server.port`, `models.NAME.options.KEY`.
        """
        return next((row.origin for row in self.show() if row.key == key), "default")

    def resolve(self, name: str) -> tuple[str, str]:
        """Return name and reference of a configured model, an alias, or a bare reference."""
        for known, model in self.config.models.items():
            if name == known or name in model.aliases:
                return known, known
        return short_name(name), name

    def model_spec(self, name: str, arguments: Mapping[str, Any] | None = None) -> ModelSpec:
        """Return one model as it is to be served.

        `name` is a configured name, an alias, or a reference that no file names. `arguments`
        win over everything; an option may stand among them or under `options`.

        Raises:
            ConfigError: a key is unknown or a value is not accepted.
        """
        return self._spec(*self.resolve(name), arguments or {})

    def changed(
        self, name: str, changes: Mapping[str, Any], served: Sequence[ModelSpec] = ()
    ) -> ModelSpec:
        """Return a model with all that was changed of it by hand.

        `name` is one of those that are served, or what `model_spec` takes. `changes` are keys as
        there; None is as if it were not given. They come over the network, so what reads files or
        runs other code cannot be set.

        Raises:
            ConfigError: a key is unknown or a value is not accepted.
        """
        options: Mapping[str, Any] = changes.get("options") or {}
        for key, value in (*changes.items(), *options.items()):
            if value is not None and check.is_out_of_reach(key, value):
                raise ConfigError(f"argument: {key} is set in the configuration only.", param=key)
        references = {spec.name: spec.model for spec in served}
        known, reference = (name, references[name]) if name in references else self.resolve(name)
        return self._spec(known, reference, changes)

    def needs_restart(self, later: Settings) -> tuple[str, ...]:
        """Return the keys in which a later configuration differs that a service cannot change."""
        keys = ("home", "server.host", "server.port", "server.state")
        keys += tuple(f"telemetry.{name}" for name in TelemetrySettings.model_fields)
        # Keys are looked at anew for each request.
        keys = tuple(key for key in keys if key != "telemetry.metrics_keys")
        whole = (self.config, later.config)
        pairs = ((key, *(attrgetter(key)(config) for config in whole)) for key in keys)
        return tuple(key for key, before, after in pairs if before != after)

    def show(self, names: Sequence[str] = ()) -> Iterator[Row]:
        """Yield each value with its origin; of the configured models and those in `names`."""
        layer = self._sources.everywhere({})
        config = self.config
        for key in sources.top_keys():
            yield _row(key, getattr(config, key), layer.get(key))
        for table, kind in TABLES.items():
            for name in kind.model_fields:
                key = f"{table}.{name}"
                yield _row(key, getattr(getattr(config, table), name), layer.get(key))
        for name in dict.fromkeys([*config.models, *names]):
            known, reference = self.resolve(name)
            yield from _model_rows(known, *_model(self._sources, known, reference, {}))

    def _spec(self, name: str, reference: str, arguments: Mapping[str, Any]) -> ModelSpec:
        given = sources.arguments(arguments, self._sources.keys, self._sources.cwd)
        model, _ = _model(self._sources, name, reference, given)
        return ModelSpec(name=name, **model.model_dump())


def _row(key: str, value: Any, source: Value | None) -> Row:
    return Row(key, masked(key, value), source.origin if source else "default")


def _model_rows(name: str, model: ModelSettings, layer: Layer) -> Iterator[Row]:
    for key in [key for key in ModelSettings.model_fields if key != "options"]:
        yield _row(f"models.{name}.{key}", getattr(model, key), layer.get(key))
    for key, value in model.options.items():
        yield _row(f"models.{name}.options.{key}", value, layer.get(f"options.{key}"))


def _model(read: _Sources, name: str, reference: str, given: Layer) -> tuple[ModelSettings, Layer]:
    layer = read.of_model(name, reference, given)
    prefix = f"models.{name}."
    kinds = read.able(layer)
    for key, value in layer.items():
        if key.startswith("options."):
            layer[key] = value._replace(value=check.option(kinds, key, value, prefix))
    return check.build(ModelSettings, layer, prefix), layer


def load(
    *,
    file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    known_options: Mapping[str, type[BaseModel]] | None = None,
) -> Settings:
    """Read all sources and check them.

    `flags` are flat keys (`port`, `context_length`); None is one that was not given, `options`
    holds engine options. `known_options` are the Options of the engines, by engine. The host
    program's arguments are never read.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value is not accepted.
    """
    variables = os.environ if environ is None else environ
    here = cwd or Path.cwd()
    engines = known_options or {}
    keys = Keys.of(engines)
    path, searched = sources.find_file(file, variables, here)
    read = _Sources(
        file=sources.parse(path),
        environment=sources.environment(variables, keys, here),
        flags=sources.flags(flags or {}, keys, here),
        keys=keys,
        engines=engines,
        cwd=here,
    )
    home = Value(str(sources.xdg(variables, "XDG_DATA_HOME", ".local/share")), "default", here)
    whole = check.build(Config, read.everywhere({"home": home}))
    models = {name: _model(read, name, name, {})[0] for name in read.file.models}
    _distinct(models, read.file.path)
    return Settings(whole.model_copy(update={"models": models}), path, searched, read)


def _distinct(models: Mapping[str, ModelSettings], path: Path | None) -> None:
    seen = dict.fromkeys(models, "a model")
    for name, model in models.items():
        for alias in model.aliases:
            if alias in seen:
                raise ConfigError(
                    f"file {path}: models.{name}.aliases: {alias} is the name of {seen[alias]}.",
                    param="aliases",
                )
            seen[alias] = f"an alias of {name}"
