"""`headrace import`: models of other programs and Modelfiles go into the configuration."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import terminal
from headrace.cli.common import Common, write_model
from headrace.core.errors import ConfigError, HeadraceError, InvalidRequest, UnknownModel

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.models.caches import CachedModel
    from headrace.models.modelfile import Imported

PROGRAMS = ("ollama", "lmstudio", "llama.cpp", "hub")


def import_(
    common: Common,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL|MODELFILE", help="Models of the list, or a Modelfile."),
    ] = None,
    program: Annotated[
        str | None, typer.Option("--from", metavar="PROGRAM", help=", ".join(PROGRAMS))
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all/--named", help="Import the whole list.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name of the model here.")
    ] = None,
) -> None:
    """Import models that Ollama, LM Studio, llama.cpp or the hub's cache have, or a Modelfile.

    Without a name, list them. Files are linked, not copied, and checked first. What a Modelfile
    has without a meaning here is left out, and listed with the reason.
    """
    settings = common.settings()
    if program not in (None, *PROGRAMS):
        raise InvalidRequest(f"--from is one of {', '.join(PROGRAMS)}.")
    if names and len(names) == 1 and program is None and Path(names[0]).is_file():
        _import_modelfile(common, settings, Path(names[0]), name)
        return
    models = _models(program)
    if not names and not everything:
        common.show(models, _listed(models))
        return
    chosen = models if everything else [_find(models, wanted) for wanted in names or ()]
    if name is not None and len(chosen) != 1:
        raise InvalidRequest("--as names one model.")
    if everything:
        _import_all(common, settings, chosen)
        return
    imported = [_import_cached(settings, model, name or model.name) for model in chosen]
    common.show(imported, (line for row in imported for line in _written(row)))


def _import_all(common: Common, settings: Settings, models: Sequence[CachedModel]) -> None:
    """Import each model that can be; list the others with their reasons, and exit with 1 then."""
    imported: dict[str, dict[str, Any]] = {}
    failed = 0
    for model in models:
        try:
            if model.name in imported:
                raise ConfigError(f"{model.name} was imported already; --from and --as name this.")
            imported[model.name] = _import_cached(settings, model, model.name)
        except HeadraceError as error:
            failed += 1
            terminal.note(f"Left out: {model.name} of {model.program}: {error.message}")
    common.show([*imported.values()], (line for row in imported.values() for line in _written(row)))
    if failed:
        raise typer.Exit(1)


def _models(program: str | None) -> list[CachedModel]:
    from headrace.models.caches import cached_models

    return [model for model in cached_models(os.environ) if program in (None, model.program)]


def _listed(models: Sequence[CachedModel]) -> Iterator[str]:
    if not models:
        yield "Ollama, LM Studio, llama.cpp and the hub's cache have no models on this machine."
        return
    rows = [(m.name, m.program, terminal.size(m.size), m.path) for m in models]
    yield from terminal.aligned(("NAME", "PROGRAM", "SIZE", "PATH"), rows, {"SIZE"})


def _find(models: Sequence[CachedModel], wanted: str) -> CachedModel:
    matching = [model for model in models if wanted in (model.name, model.path)]
    if not matching and ":" not in wanted:
        matching = [model for model in models if model.name == f"{wanted}:latest"]
    if not matching:
        raise UnknownModel(
            f"{wanted} is neither a Modelfile nor a model of another program; `headrace import` "
            "lists these.",
            param="model",
        )
    if len({model.path for model in matching}) > 1:
        programs = ", ".join(model.program for model in matching)
        raise InvalidRequest(f"{wanted} is a model of {programs}; --from or its path names one.")
    return matching[0]


def _import_cached(settings: Settings, model: CachedModel, name: str) -> dict[str, Any]:
    from headrace import runtime
    from headrace.core.model import SETTINGS
    from headrace.models import gguf_model
    from headrace.models import modelfile as reader

    _check_name(settings, name)
    path = Path(model.path)
    files = gguf_model.parts(path) if path.is_file() else [path]
    if model.projector is not None:
        files.append(Path(model.projector))
    linked = runtime.store(settings.config).import_links(name, files)
    text = f"FROM {linked}\n{model.modelfile}"
    made = reader.imported(text, linked.parent, {}, {*SETTINGS})
    return _write(settings, name, made, f"from {model.program}")


def _check_name(settings: Settings, name: str) -> None:
    if name in settings.config.models:
        raise ConfigError(f"The configuration has a model {name} already; --as names another.")


def _write(settings: Settings, name: str, made: Imported, remark: str) -> dict[str, Any]:
    path = settings.file or settings.searched[-1]
    write_model(path, name, made.settings, remark)
    plain = {"settings": made.settings, "left_out": made.left_out}
    return {"name": name, "file": str(path), **plain}


def _import_modelfile(
    common: Common, settings: Settings, modelfile: Path, name: str | None
) -> None:
    from headrace.core.model import SETTINGS
    from headrace.models import modelfile as reader

    models = {key: settings.model_spec(key).model for key in settings.config.models}
    try:
        text = _text(modelfile)
        made = reader.imported(text, modelfile.absolute().parent, models, {*SETTINGS})
    except ConfigError as error:
        raise ConfigError(f"file {modelfile}: {error.message}") from error
    wanted = name or made.name
    if not wanted:
        raise ConfigError("FROM gives the model no name of its own; --as gives it one.")
    _check_name(settings, wanted)
    row = _write(settings, wanted, made, f"from {modelfile.name}")
    common.show(row, _written(row))


_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _text(path: Path) -> str:
    from headrace.models.modelfile import MAX_MODELFILE

    try:
        with path.open("rb") as file:
            data = file.read(MAX_MODELFILE + 1)
    except OSError as error:
        raise ConfigError(str(error.strerror or error)) from error
    if len(data) > MAX_MODELFILE:
        raise ConfigError(f"it has more than {MAX_MODELFILE} bytes.")
    try:
        return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8")
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8.") from None


_NOTES = ("FROM", "ADAPTER")


def _written(row: dict[str, Any]) -> Iterator[str]:
    yield f"Wrote {', '.join(row['settings'])} of {row['name']} into {row['file']}."
    for instruction, reason in row["left_out"].items():
        yield f"{'Note' if instruction in _NOTES else 'Left out'}: {instruction}: {reason}."
