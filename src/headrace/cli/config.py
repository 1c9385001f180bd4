"""`headrace config`: what is set, and by whom."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from headrace.cli import terminal
from headrace.cli.common import Common, with_common

app = typer.Typer(help="Show the configuration.", no_args_is_help=True)


def show(
    common: Common,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Further models to show.")
    ] = None,
) -> None:
    """Print each value with its origin; secrets are masked."""
    rows = list(common.settings(service=True).show(models or []))
    if common.as_json:
        found = {row.key: {"value": row.value, "origin": row.origin} for row in rows}
        terminal.print_json(found)
    else:
        terminal.columns(("KEY", "VALUE", "ORIGIN"), [_cells(*row) for row in rows])


def _cells(key: str, value: Any, origin: str) -> tuple[str, str | None, str]:
    shown = ", ".join(cast("list[str]", value)) if isinstance(value, list) else value
    # A chat template has many lines.
    return key, None if shown in (None, "") else str(shown).replace("\n", "\\n")[:60], origin


def path(common: Common) -> None:
    """Print the file that is read, and where one is looked for."""
    settings = common.settings(service=True)
    if common.as_json:
        terminal.print_json({"file": settings.file, "searched": list(settings.searched)})
        return
    print(settings.file or "No file is read.")
    for place in settings.searched:
        terminal.note(f"looked at {place}")


app.command("show")(with_common(show))
app.command("path")(with_common(path))
