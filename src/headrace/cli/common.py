"""What every command shares: its global flags, and how it is registered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import Settings

_PANEL = "Everywhere"
_FLAGS: dict[str, Any] = {
    "as_json": Annotated[
        bool | None,
        typer.Option("--json/--no-json", help="Print JSON.", rich_help_panel=_PANEL),
    ],
    "file": Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Read this file.", rich_help_panel=_PANEL),
    ],
    "home": Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep models and state here.", rich_help_panel=_PANEL),
    ],
    "verbose": Annotated[
        bool | None,
        typer.Option(
            "--verbose/--no-verbose", "-v", help="Tell and log more.", rich_help_panel=_PANEL
        ),
    ],
    "debug": Annotated[
        bool | None,
        typer.Option("--debug/--no-debug", help="Show tracebacks.", rich_help_panel=_PANEL),
    ],
}


def known_models(incomplete: str) -> list[str]:
    """Return names for the completion of a shell: of the configuration and the catalogue."""
    from headrace import config
    from headrace.models.catalog import CATALOG

    try:
        configured = config.load().config.models
    except ConfigError:
        configured = {}
    return sorted(name for name in {*configured, *CATALOG} if name.startswith(incomplete))


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Name, path, hub:org/repo[:file] or index:package.",
        autocompletion=known_models,
    ),
]


@dataclass(frozen=True)
class Common:
    """The flags that stand before or after every command; None is not given."""

    as_json: bool | None = None
    file: Path | None = None
    home: Path | None = None
    verbose: bool | None = None
    debug: bool | None = None

    def settings(self, *, service: bool = False, **flags: Any) -> Settings:
        """Read the configuration with the flags of a command on top, and set up logging.

        What is no service logs warnings only, unless told otherwise.

        Raises:
            ConfigError: as `headrace.config.load` does.
        """
        from headrace import log, runtime

        given = {"home": self.home, "log_level": "debug" if self.verbose else None, **flags}
        settings = runtime.load_settings(file=self.file, flags=given)
        config = settings.config
        if not service and settings.origin("log_level") == "default":
            config = config.model_copy(update={"log_level": "warning"})
        log.configure(config.log_level, config.log_format)
        return replace(settings, config=config)


def parse_options(pairs: list[str] | None, where: str = "flag -o") -> dict[str, str]:
    """Read `KEY=VALUE` pairs.

    Raises:
        ConfigError: one has no `=`.
    """
    parted = [pair.partition("=") for pair in pairs or []]
    for key, equals, _ in parted:
        if not (key and equals):
            raise ConfigError(f"{where}: {key or '='} is not KEY=VALUE.")
    return {key.strip().replace("-", "_"): value for key, _, value in parted}


def with_common(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the global flags; it takes them as its first parameter, a Common."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    own = list(signature.parameters.values())[1:]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _FLAGS.items()
    ]

    @functools.wraps(function)
    def command(ctx: typer.Context, **given: Any) -> None:
        mine = {name: given.pop(name) for name in _FLAGS}
        # A flag after the command wins over the same one before it.
        before = ctx.obj if isinstance(ctx.obj, Common) else Common()
        ctx.obj = replace(before, **_given(mine))
        function(ctx.obj, **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    kinds = {name: hints[name] for name in (parameter.name for parameter in parameters)}
    shown = [parameter.replace(annotation=kinds[parameter.name]) for parameter in parameters]
    command.__signature__ = signature.replace(parameters=[context, *shown, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {"ctx": typer.Context, **kinds, **_FLAGS}
    del command.__wrapped__
    return command


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}
