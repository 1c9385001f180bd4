"""`headrace import`: a Modelfile of Ollama becomes a model of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.common import Common, write_model
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.models.modelfile import Imported


def import_(
    common: Common,
    modelfile: Annotated[Path, typer.Argument(metavar="MODELFILE", help="Ollama's Modelfile.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name of the model here.")
    ] = None,
) -> None:
    """Read a Modelfile of Ollama and write its model into the configuration.

    What has no meaning here is left out, and listed with the reason.
    """
    from headrace.core.model import SETTINGS
    from headrace.models import modelfile as reader

    settings = common.settings()
    models = {key: settings.model_spec(key).model for key in settings.config.models}
    try:
        text = _text(modelfile)
        made = reader.imported(text, modelfile.absolute().parent, models, {*SETTINGS})
    except ConfigError as error:
        raise ConfigError(f"file {modelfile}: {error.message}") from error
    wanted = name or made.name
    if not wanted:
        raise ConfigError("FROM gives the model no name of its own; --as gives it one.")
    if wanted in models:
        raise ConfigError(f"The configuration has a model {wanted} already; --as names another.")
    path = settings.file or settings.searched[-1]
    write_model(path, wanted, made.settings, f"from {modelfile.name}")
    shown = {"name": wanted, "file": str(path), **_plain(made)}
    common.show(shown, _lines(wanted, path, made))


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
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8.") from None


def _plain(made: Imported) -> dict[str, object]:
    return {"settings": made.settings, "left_out": made.left_out}


def _lines(name: str, path: Path, made: Imported) -> Iterator[str]:
    yield f"Wrote {', '.join(made.settings)} of {name} into {path}."
    for instruction, reason in made.left_out.items():
        yield f"{'Note' if instruction == 'FROM' else 'Left out'}: {instruction}: {reason}."
