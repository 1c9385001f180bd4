"""`headrace connect`: sets up the programs of others for a running service."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from headrace.cli import streams, terminal
from headrace.cli.common import Common, Url
from headrace.core.errors import ConfigError, InvalidRequest, UnknownModel
from headrace.core.values import is_text

if TYPE_CHECKING:
    from headrace.cli.client import Client
    from headrace.cli.clients import Connection
    from headrace.cli.setups import File, Setup, Target

_ANSWER_TOKENS = 2048
_TASKS = ("generate",)


def _names(incomplete: str) -> list[str]:
    from headrace.cli.clients import CLIENTS

    return [name for name in CLIENTS if name.startswith(incomplete)]


def connect(
    common: Common,
    name: Annotated[
        str | None,
        Argument(metavar="CLIENT", autocompletion=_names, help="The client; without it, all."),
    ] = None,
    arguments: Annotated[
        list[str] | None, Argument(metavar="ARGUMENTS", help="For the client, after `--run --`.")
    ] = None,
    model: Annotated[str | None, Option(help="Model that the client uses.")] = None,
    yes: Annotated[bool, Option("--yes/--no-yes", "-y", help="Do not ask.")] = False,
    only_print: Annotated[bool, Option("--print", help="Print the set-up; write none.")] = False,
    run: Annotated[
        bool, Option("--run", help="Start the client with a set-up of its own, and write none.")
    ] = False,
    url: Url = None,
) -> None:
    """Set up a client for a running service: shows what would be written, and asks.

    A file with other content is copied before it is changed. Keys are not written: files name the
    variable HEADRACE_API_KEY.
    """
    if name is None:
        _list(common)
        return
    entry = _entry(name)
    if run and entry.run is None:
        raise InvalidRequest(f"{entry.title} cannot be started with a set-up of its own.")
    if arguments and not run:
        raise InvalidRequest("Arguments for the client go with --run.")
    target = common.ask(url, lambda client: _target(client, model))
    for warning in warnings_of(entry, target):
        terminal.note(f"warning: {warning}")
    if run:
        _run(entry, target, common.settings().config.home, arguments or ())
        return
    setup = entry.build(target, Path.home())
    if not only_print:
        _write(setup, yes=yes, can_ask=not common.as_json and streams.is_terminal())
    common.show(_plain(name, target, setup), _lines(setup, with_files=only_print))


def _list(common: Common) -> None:
    from headrace.cli.clients import CLIENTS

    heads = ("client", "", "API", "set up by")
    rows = [(name, entry.title, entry.api, entry.how) for name, entry in CLIENTS.items()]
    keys = ("client", "title", "api", "how")
    value = [dict(zip(keys, row, strict=True)) for row in rows]
    common.show(value, terminal.aligned(heads, rows))


def _entry(name: str) -> Connection:
    from headrace.cli.clients import CLIENTS

    if name in CLIENTS:
        return CLIENTS[name]
    near = difflib.get_close_matches(name, CLIENTS, 1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(CLIENTS)}."
    raise InvalidRequest(f"The client {name} is unknown; {hint}")


async def _target(client: Client, name: str | None) -> Target:
    """Return the service with its models that answer, that of the client first."""
    from headrace.cli.setups import Target

    cards = await client.cards()
    aliases = {alias for card in cards for alias in card.aliases}
    models = [
        card
        for card in cards
        if card.id not in aliases and is_text(card.id) and "generate" in (card.tasks or _TASKS)
    ]
    listed = ", ".join(card.id for card in models) or "none"
    if name is None and len(models) != 1:
        raise ConfigError(f"Name a model of the service with --model: {listed}.", param="model")
    main = next((card for card in models if name in (None, card.id, *card.aliases)), None)
    if main is None:
        raise UnknownModel(f"The model {name} is not served at {client.url}; there is {listed}.")
    others = [card for card in models if card is not main]
    return Target(client.url, (main, *others), needs_key=bool(client.key))


def warnings_of(entry: Connection, target: Target) -> Iterator[str]:
    """Yield what the model lacks that the client needs."""
    from headrace.cli.setups import KEY

    model = target.main
    if entry.tools and not model.calls_tools:
        yield f"{model.id} calls no tools, which {entry.title} works with."
    elif entry.tools and model.tools == "generic":
        yield f"{model.id} was not made for tools; {entry.title} works with them."
    size, needed = model.context_length, entry.prompt + _ANSWER_TOKENS
    if entry.prompt and size and size < needed:
        yield (
            f"{model.id} has a context of {size} tokens; {entry.title} begins with a prompt of "
            f"about {entry.prompt}."
        )
    if target.needs_key and not os.environ.get(KEY):
        yield f"{KEY} is not set; {entry.title} needs a key of the service there."


def _run(entry: Connection, target: Target, home: Path, arguments: Sequence[str]) -> None:
    """Become the client; its files are in a folder of Headrace's."""
    from headrace.cli.setups import KEY
    from headrace.lab.tune.write import save

    build = entry.run or entry.build
    setup = build(target, home / "clients")
    if (program := shutil.which(setup.command[0])) is None:
        raise ConfigError(
            f"{entry.title} is not installed: there is no {setup.command[0]} in PATH."
        )
    for file in setup.files:
        save(file.path, file.text)
    key = os.environ.get(KEY, "")
    env = {variable: value.replace(f"${KEY}", key) for variable, value in setup.env.items()}
    sys.stdout.flush()
    os.execve(program, [*setup.command, *arguments], {**os.environ, **env})  # noqa: S606


def _write(setup: Setup, *, yes: bool, can_ask: bool) -> None:
    """Show what changes in files, ask, and write them; what was there is copied first."""
    from headrace.cli import setups
    from headrace.lab.tune.write import save

    changes = [change for file in setup.files if (change := setups.change_of(file))]
    for change in changes:
        for line in change.diff():
            terminal.note(line)
    if changes and not yes:
        if not can_ask:
            raise InvalidRequest("Nothing was written; --yes confirms it, --print only prints it.")
        typer.confirm("Write this?", abort=True, err=True)
    for change in changes:
        if copy := change.backup():
            terminal.note(f"What was there is in {copy}.")
        save(change.path, change.after)
        terminal.note(f"Wrote {change.path}.")


def _plain(name: str, target: Target, setup: Setup) -> dict[str, Any]:
    files = [{"path": str(file.path), "text": file.text} for file in setup.files]
    about = {"client": name, "model": target.main.id, "url": target.url, "files": files}
    return {**about, "env": setup.env, "command": setup.command, "steps": setup.steps}


def _lines(setup: Setup, *, with_files: bool) -> Iterator[str]:
    """Yield the set-up for people; what a shell takes is written as it takes it."""
    for file in setup.files if with_files else ():
        yield from _file_lines(file)
    yield from setup.steps
    for variable, value in setup.env.items():
        yield f"export {variable}={_for_shell(value)}"
    if setup.command:
        yield shlex.join(setup.command)


def _file_lines(file: File) -> Iterable[str]:
    how = {"own": "", "json": ", merged into what is there", "block": ", added to it"}
    return (f"# {file.path}{how[file.kind]}:", *file.text.splitlines(), "")


def _for_shell(value: str) -> str:
    from headrace.cli.setups import KEY

    return f'"${KEY}"' if value == f"${KEY}" else shlex.quote(value)
