"""`headrace pull`, `ls`, `show` and `rm`: the models on this machine."""

from __future__ import annotations

import shutil
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from typer import Argument, Option

from headrace.cli import streams, terminal
from headrace.cli.common import Common, ModelArgument, ModelFlags, known_models
from headrace.core.errors import InvalidRequest, UnknownModel
from headrace.core.preset import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from headrace.config import Config
    from headrace.core.model import ModelFile, ModelInfo, ModelSpec
    from headrace.core.parameters import Parameter
    from headrace.models.store import StoredModel
    from headrace.models.transfer import Progress


# What only a service knows of a model, and what has lines of its own.
_NOT_SHOWN = ("state", "options", "created")


def pull(
    common: Common,
    model: ModelArgument,
    engine: Annotated[
        str | None, Option("--for", metavar="ENGINE", help="Convert it for this engine.")
    ] = None,
) -> None:
    """Download and verify a model; with --for, convert it to the format of an engine."""
    from headrace import runtime

    settings = common.settings()
    spec = settings.model_spec(model)
    with terminal.progress() as report:
        if engine is None:
            resolved = runtime.resolver(settings.config)(spec, report)
            file = resolved.file
        else:
            file = resolved = _converted(spec, engine, settings.config, report)
    common.show(resolved, [_place(file, spec.name)])


def _place(file: ModelFile, name: str) -> str:
    if file.format == "remote":
        return f"{name} is served by {file.provider}; there is nothing to download."
    return file.path or f"{name} needs no file."


def _converted(spec: ModelSpec, engine: str, config: Config, report: Progress) -> ModelFile:
    from headrace import engines, runtime
    from headrace.engines.openvino import conversion
    from headrace.models.reference import parse

    engines.about(engine)  # refuses an unknown engine by name
    file = runtime.store(config).model_file(parse(_reference(spec)), report)
    if engine == "openvino":
        return conversion.convert(file, config.home, report)
    engines.choose(file, engine)  # refuses an engine that cannot read the file
    return file


def show(common: Common, model: ModelArgument, flags: ModelFlags) -> None:
    """Show a model, which engine would run it and why, and the engine's options."""
    from headrace import runtime

    settings = flags.settings(common)
    spec = settings.model_spec(model)
    info = runtime.with_tool_format(runtime.describe(spec, settings.config), spec)
    if (preset := spec.presets.get(model)) is not None:
        info = msgspec.structs.replace(info, id=model, base=info.id, preset=plain(preset))
    parameters = runtime.parameters(spec, info.engine)
    options = [parameter for parameter in parameters if parameter.kind == "option"]
    described = {
        **msgspec.to_builtins(info),
        "settings": [_plain(item) for item in parameters if item.kind == "setting"],
        "engine_options": [_plain(item) for item in options],
    }
    common.show(described, _model_lines(info, options))


def _model_lines(info: ModelInfo, options: Sequence[Parameter]) -> Iterator[str]:
    yield from terminal.aligned((), _facts(info))
    if options:
        yield f"\nOptions of {info.engine} (-o KEY=VALUE):"
        heads = ("OPTION", "VALUE", "DEFAULT", "HELP")
        rows = ((option.name, option.value, option.default, option.help) for option in options)
        yield from terminal.aligned(heads, rows)


_LISTED = ("aliases", "roles", "notes", "capabilities")


def _facts(info: ModelInfo) -> Iterator[tuple[str, Any]]:
    """Yield the known facts by name, with readable sizes and the length of long texts."""
    facts: dict[str, Any] = msgspec.to_builtins(info)
    facts["capabilities"] = tuple(info.capabilities.names)
    for name, value in facts.items():
        if name in _NOT_SHOWN or value in (None, "", "none", 0, (), {}):
            continue
        name = name.replace("_", " ")
        if name == "tool format":
            yield from info.tool_format.items()
        elif name in ("preset", "prompts"):
            yield name, ", ".join(f"{key} = {part!r}" for key, part in value.items())
        elif name in ("size", "memory"):
            yield name, terminal.size(value)
        elif name == "chat template":
            yield name, f"{len(value)} characters"
        elif name == "parameters":
            yield name, f"{value / 1e6:.0f} M"
        else:
            yield name, ", ".join(value) if name in _LISTED else value


def _plain(parameter: Parameter) -> dict[str, Any]:
    """Return a description for JSON, its name under its kind."""
    plain: dict[str, Any] = msgspec.to_builtins(parameter, enc_hook=str)
    return {plain.pop("kind"): plain.pop("name"), **plain}


def ls(common: Common) -> None:
    """List the models on this machine."""
    from headrace import runtime
    from headrace.models.converted import copies

    config = common.settings().config
    stored = list(runtime.store(config).list())
    converted = defaultdict[str, int](int)
    for copy, source in copies(config.home):
        converted[str(source)] += _size_of(copy)
    listed = [
        {**msgspec.to_builtins(m), "converted": converted.pop(str(Path(m.path).resolve()), 0)}
        for m in stored
    ]
    common.show(listed, _stored_lines(stored, listed, converted))


def _stored_lines(
    stored: Sequence[StoredModel], listed: Sequence[dict[str, Any]], others: Mapping[str, int]
) -> Iterator[str]:
    rows = [
        (
            m.name,
            terminal.size(m.size),
            terminal.size(row["converted"] or None),
            _day(m.added),
            m.reference,
        )
        for m, row in zip(stored, listed, strict=True)
    ]
    rows += [
        (Path(path).name, None, terminal.size(size), None, path) for path, size in others.items()
    ]
    if rows:
        yield from terminal.aligned(("NAME", "SIZE", "CONVERTED", "ADDED", "REFERENCE"), rows)
    else:
        yield "There are no models yet; `headrace pull smollm2` fetches a small one."


def _day(second: int) -> str:
    return datetime.fromtimestamp(second, tz=UTC).date().isoformat()


def rm(
    common: Common,
    models: Annotated[list[str], Argument(metavar="MODEL", autocompletion=known_models)],
    yes: Annotated[bool, Option("--yes/--no-yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete models from this machine; a file that was there before Headrace stays."""
    from headrace import runtime
    from headrace.models.reference import parse

    settings = common.settings()
    store = runtime.store(settings.config)
    references = [_reference(settings.model_spec(name)) for name in models]
    for name, reference in zip(models, references, strict=True):
        if (stored := store.find(parse(reference))) is None:
            raise UnknownModel(f"{name} is not on this machine; `headrace ls` lists what is.")
        _check_unused(name, Path(stored.path))
    if not yes:
        if common.as_json or not streams.is_terminal():
            raise InvalidRequest(f"Nothing was deleted; --yes confirms it for {', '.join(models)}.")
        typer.confirm(f"Delete {', '.join(models)}?", abort=True, err=True)
    freed = sum(map(store.remove, references)) + _remove_copies(settings.config.home)
    message = f"Deleted {', '.join(models)}; {terminal.size(freed)} are free again."
    common.show({"removed": models, "freed": freed}, [message])


def _check_unused(name: str, path: Path) -> None:
    """Refuse to delete a model that a process has loaded."""
    from headrace.machine.process import users_of

    if path.exists() and (users := users_of(path)):
        numbers = ", ".join(str(user.pid) for user in users)
        raise InvalidRequest(
            f"{name} is loaded by process {numbers}; `headrace stop {name}` unloads it from a "
            "service."
        )


def _remove_copies(home: Path) -> int:
    """Delete the converted copies whose model is gone; return their size."""
    from headrace.models.converted import copies

    freed = 0
    for copy, source in copies(home):
        if not source.exists():
            freed += _size_of(copy)
            shutil.rmtree(copy)
    return freed


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _reference(spec: ModelSpec) -> str:
    """Return a model's reference with the revision that its settings pin."""
    pinned = spec.model.startswith("hub:") and spec.revision and "@" not in spec.model
    return f"{spec.model}@{spec.revision}" if pinned else spec.model
