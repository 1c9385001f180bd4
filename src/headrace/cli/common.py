"""What every command shares: its global flags, and how it is registered."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import Settings

_PANEL = "Everywhere"


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

    as_json: Annotated[
        bool | None,
        typer.Option("--json/--no-json", help="Print JSON.", rich_help_panel=_PANEL),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Read this file.", rich_help_panel=_PANEL),
    ] = None
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep models and state here.", rich_help_panel=_PANEL),
    ] = None
    verbose: Annotated[
        bool | None,
        typer.Option(
            "--verbose/--no-verbose", "-v", help="Tell and log more.", rich_help_panel=_PANEL
        ),
    ] = None
    debug: Annotated[
        bool | None,
        typer.Option("--debug/--no-debug", help="Show tracebacks.", rich_help_panel=_PANEL),
    ] = None

    def settings(self, *, service: bool = False, **flags: Any) -> Settings:
        """Read the configuration with the flags of a command on top, and set up logging.

        What is no service logs warnings only, unless told otherwise.

        Raises:
            ConfigError: as `headrace.config.load` does.
        """
        from headrace import log, runtime

        flags = {"home": self.home, "log_level": "debug" if self.verbose else None, **flags}
        settings = runtime.load_settings(file=self.file, flags=flags)
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


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the fastest event loop that there is here; None: asyncio's own."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def given(flags: Any) -> dict[str, Any]:
    """Return those flags of a dataclass that were given, by name."""
    return {name: value for name, value in asdict(flags).items() if value is not None}


def with_common(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first parameter is a Common.

    A parameter whose type is a dataclass stands for its fields: each becomes a flag.
    """
    hints = get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    groups = {one.name: hints[one.name] for one in own if is_dataclass(hints[one.name])}
    flags = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(flag for one in own for flag in _flags(one.name, hints[one.name], one.default)),
        *_flags("", Common),
    ]

    @functools.wraps(function)
    def command(ctx: typer.Context, **values: Any) -> None:
        common, *made = (
            kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for kind in (Common, *groups.values())
        )
        # A flag after the command wins over the same one before it.
        before = ctx.obj if isinstance(ctx.obj, Common) else Common()
        ctx.obj = replace(before, **given(common))
        function(ctx.obj, **values, **dict(zip(groups, made, strict=True)))

    command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    command.__annotations__ = {flag.name: flag.annotation for flag in flags}
    del command.__wrapped__
    return command


def _flags(name: str, kind: Any, default: Any = None) -> list[inspect.Parameter]:
    """Return a parameter of a command, or those that a dataclass stands for."""
    if not is_dataclass(kind):
        return [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
        ]
    kinds = get_type_hints(kind, include_extras=True)
    return [
        flag
        for field in fields(kind)
        for flag in _flags(field.name, kinds[field.name], field.default)
    ]
