"""Flags that commands share, and the decorator that makes a command of a function."""

from __future__ import annotations

import asyncio
import difflib
import functools
import gc
import inspect
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import msgspec
import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.core.errors import ConfigError
from headrace.core.sampling import Range, described

if TYPE_CHECKING:
    from headrace.cli.client import Client
    from headrace.config import Settings

T = TypeVar("T")

_WIDE = 2**31 - 1
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - not to bind


def known_models(incomplete: str) -> list[str]:
    """Return names for shell completion, from the configuration and the catalogue."""
    from headrace import config
    from headrace.models.reference import CATALOG

    try:
        configured = config.load().config.models
    except ConfigError:
        configured = {}
    return sorted(name for name in {*configured, *CATALOG} if name.startswith(incomplete))


ModelArgument = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Name, path, hub:org/repo[:file] or index:package.",
        autocompletion=known_models,
    ),
]
Engine = Annotated[str | None, Option(help="Use this engine.")]
Device = Annotated[
    str | None,
    Option(help="cpu, cuda, mps, rocm, sycl, vulkan, cuda:1, a list, or a number of GPUs."),
]
ContextLength = Annotated[int | None, Option(help="Tokens of prompt and answer.")]
Options = Annotated[
    list[str] | None,
    Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Option of the engine; `headrace show MODEL` lists them.",
    ),
]
Env = Annotated[
    list[str] | None,
    Option(
        metavar="NAME[=VALUE]",
        help="Variable of the model's process; without a value, the one that is set here.",
    ),
]
Url = Annotated[
    str | None,
    Option(
        metavar="URL",
        help="The service; by default HEADRACE_URL, or as configured.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Common:
    """The flags that are allowed before and after every command; None is not given."""

    as_json: Annotated[bool | None, Option("--json/--no-json", help="Print JSON.")] = None
    file: Annotated[Path | None, Option("--config", metavar="FILE", help="Read this file.")] = None
    home: Annotated[Path | None, Option(metavar="DIR", help="Keep models and state here.")] = None
    verbose: Annotated[
        bool | None, Option("--verbose/--no-verbose", "-v", help="Show and log more.")
    ] = None
    debug: Annotated[bool | None, Option("--debug/--no-debug", help="Show tracebacks.")] = None

    def settings(self, *, service: bool = False, **flags: Any) -> Settings:
        """Read the configuration with the flags of a command on top, and set up logging.

        Unless the level is configured, only a service logs more than warnings.

        Raises:
            ConfigError: as `headrace.config.load` does.
        """
        from headrace import log, runtime
        from headrace.machine import tune_garbage_collection

        flags = {"home": self.home, "log_level": "debug" if self.verbose else None, **flags}
        settings = runtime.load_settings(file=self.file, flags=flags)
        if not gc.isenabled():
            tune_garbage_collection()
        config = settings.config
        if not service and settings.origin("log_level") == "default":
            config = config.model_copy(update={"log_level": "warning"})
        log.configure(config.log_level, config.log_format)
        if config.log_level == "warning":
            # What the pool warns of is the error of the command.
            logging.getLogger("headrace.pool").setLevel(logging.ERROR)
        return replace(settings, config=config)

    def ask(self, url: str | None, work: Callable[[Client], Awaitable[T]]) -> T:
        """Run `work` with a client of the running service, and return its result."""
        from headrace.cli.client import Client

        async def run() -> T:
            async with Client(address(self.settings(), url)) as client:
                return await work(client)

        return asyncio.run(run())

    def show(self, value: object, lines: Iterable[str]) -> None:
        """Print the result of a command: the value as JSON with --json, else the lines."""
        if self.as_json:
            terminal.print_json(value)
            return
        for line in lines:
            print(line)


@dataclass(frozen=True)
class ModelFlags:
    """The flags on how to run a model."""

    engine: Engine = None
    device: Device = None
    context_length: ContextLength = None
    option: Options = None
    env: Env = None

    def settings(self, common: Common, *, service: bool = False, **more: Any) -> Settings:
        """Read the configuration with these flags, and more, on top.

        Raises:
            ConfigError: as `Common.settings` does.
        """
        flags = {name: value for name, value in given(self).items() if name != "option"}
        options = parse_options(self.option)
        return common.settings(service=service, options=options, **flags, **more)


def address(settings: Settings, url: str | None) -> str:
    """Return the address of the service: the given one, HEADRACE_URL, or where `serve` listens.

    Raises:
        ConfigError: the configured port is 0, a free one.
    """
    if place := url or os.environ.get("HEADRACE_URL"):
        place = place if "://" in place else f"http://{place}"
        return place.rstrip("/").removesuffix("/v1")
    server = settings.config.server
    if server.port == 0:
        raise ConfigError("The port is a free one; name it with --url.", param="port")
    host = _ANY_ADDRESS.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def parse_options(pairs: list[str] | None, where: str = "flag -o") -> dict[str, str]:
    """Read `KEY=VALUE` pairs.

    Raises:
        ConfigError: a pair has no `=`.
    """
    parted = [pair.partition("=") for pair in pairs or []]
    for key, equals, _ in parted:
        if not (key and equals):
            raise ConfigError(f"{where}: {key or '='} is not KEY=VALUE.")
    return {key.strip().replace("-", "_"): value for key, _, value in parted}


def given(flags: Any) -> dict[str, Any]:
    """Return the flags of a group that are not None, by name."""
    values = {name: getattr(flags, name) for name, _ in _defaults(type(flags))}
    return {name: value for name, value in values.items() if value is not None}


def with_common(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first parameter is a Common.

    A parameter whose type is a group, a dataclass or a Struct, is replaced by its fields: each
    becomes a flag.
    """
    hints = get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    groups = {param.name: hints[param.name] for param in own if _is_group(hints[param.name])}
    flags = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(flag for param in own for flag in _flags(param.name, hints[param.name], param.default)),
        *_flags("", Common),
    ]

    @functools.wraps(function)
    def command(ctx: typer.Context, **values: Any) -> None:
        common, *made = (
            kind(**{name: values.pop(name) for name, _ in _defaults(kind)})
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


def _is_group(kind: Any) -> bool:
    return is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct))


def _defaults(group: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the default of each field of a group."""
    for field in fields(group) if is_dataclass(group) else msgspec.structs.fields(group):
        yield field.name, field.default


def _flags(name: str, kind: Any, default: Any = None) -> list[inspect.Parameter]:
    """Return a parameter of a command, or those of a group's fields."""
    if not _is_group(kind):
        return [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
        ]
    kinds = get_type_hints(kind, include_extras=True)
    if not is_dataclass(kind):
        kinds |= {name: _option(*field) for name, field in described(kind).items()}
    return [
        flag for name, default in _defaults(kind) for flag in _flags(name, kinds[name], default)
    ]


def _option(kind: type, meta: msgspec.Meta) -> Any:
    """Return the hint of a flag whose help and range are those of a field."""
    allowed: Range | None = (meta.extra or {}).get("range")
    bounds = _bounds(allowed) if allowed else ""
    return Annotated[kind | None, Option(help=f"{meta.description}{bounds}")]


def _bounds(allowed: Range) -> str:
    """Describe a range, without the bounds of the integer type."""
    low = f"above {allowed.low}" if allowed.above else f"{allowed.low}"
    if allowed.high < _WIDE:
        return f"  [{low} to {allowed.high}]"
    return f"  [{low} or more]" if allowed.low > -_WIDE else ""


def write_model(path: Path, name: str, settings: Mapping[str, Any], remark: str) -> None:
    """Write settings of a model into a configuration file, and show the lines that change.

    Raises:
        ConfigError: the file cannot be edited or written.
    """
    from headrace.lab.tune import write

    before = path.read_text(encoding="utf-8") if path.exists() else ""
    after = write.edited(before, name, settings, remark)
    texts = before.splitlines(), after.splitlines()
    for line in difflib.unified_diff(*texts, str(path), str(path), lineterm="", n=2):
        terminal.note(line)
    write.save(path, after)
