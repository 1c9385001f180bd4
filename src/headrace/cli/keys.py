"""`headrace keys`: the keys in the database, which is read and written directly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.cli.common import Common, given, with_common
from headrace.core.errors import InvalidRequest, UnknownKey
from headrace.core.keys import Account, Key, KeyChange, Limits, NewKey, Scope
from headrace.core.wording import refusal

if TYPE_CHECKING:
    from headrace.keys.book import KeyBook

T = TypeVar("T", bound=msgspec.Struct)

app = typer.Typer(help="Create, limit and revoke API keys.", no_args_is_help=True)

_HEADS = ("ID", "NAME", "SCOPE", "STATE", "LIMITS", "MODELS", "REQUESTS", "TOKENS", "LAST USED")
_UNITS = {"minute": "min", "day": "day"}

Which = Annotated[str, Argument(metavar="KEY", help="Id of the key, or its name.")]
ModelNames = Annotated[
    str | None,
    Option(metavar="NAME,...", help="Models that it may use; all if this is empty."),
]


@dataclass(frozen=True)
class LimitFlags:
    """Limits of a key; None is not given, 0 no limit."""

    requests_per_minute: Annotated[int | None, Option(help="Requests in a minute.")] = None
    requests_per_day: Annotated[int | None, Option(help="Requests in a day, in UTC.")] = None
    tokens_per_minute: Annotated[int | None, Option(help="Tokens in a minute.")] = None
    tokens_per_day: Annotated[int | None, Option(help="Tokens in a day, in UTC.")] = None
    concurrent: Annotated[int | None, Option(help="Requests at a time.")] = None


def list_(
    common: Common,
    all: Annotated[bool, Option("--all", help="Also those that were revoked.")] = False,
) -> None:
    """List the keys of the database: limits, and what was used of them today."""
    accounts = _read(common)
    shown = [each for each in accounts if all or each.key.revoked is None]
    now = time.time()
    report = [
        {**msgspec.to_builtins(each.key), "used": msgspec.to_builtins(each.counts.at(now))}
        for each in shown
    ]
    common.show(report, terminal.aligned(_HEADS, (_row(each, now) for each in shown)))


def create(
    common: Common,
    name: Annotated[str, Argument(metavar="NAME", help="What the key is for.")],
    scope: Annotated[
        Scope, Option(help="inference uses models; admin also manages them, and keys.")
    ] = "inference",
    models: ModelNames = None,
    *,
    limits: LimitFlags,
) -> None:
    """Create a key and print it: it is shown this once, and kept as a hash only.

    Running services take it at once. From the first key on, all requests need one.
    """
    wanted = {"name": name, "scope": scope, "limits": _limits(limits), "models": _names(models)}
    new = _converted(wanted, NewKey)
    with _book(common) as book:
        if scope != "admin" and not _has_admin(common, book):
            terminal.note(
                "note: there is no admin key yet; services with keys are managed with one: "
                "`headrace keys create NAME --scope admin`"
            )
        plain, key = book.create(new)
    terminal.note(f"{key.id} {key.name}: keep this key, it is not shown again.")
    common.show({"key": plain, "created": msgspec.to_builtins(key)}, [plain])


def limit(
    common: Common,
    key: Which,
    models: ModelNames = None,
    *,
    limits: LimitFlags,
) -> None:
    """Change the limits or the allowed models of a key; 0 removes a limit."""
    changed = given(limits)
    if not changed and models is None:
        raise InvalidRequest("Give a limit, such as --requests-per-day 1000, or --models.")
    with _book(common) as book:
        known = _find(book, key)
        change: dict[str, Any] = {} if models is None else {"models": _names(models)}
        if changed:
            before = msgspec.to_builtins(known.limits)
            change["limits"] = {
                name: value for name, value in (before | changed).items() if value != 0
            }
        updated = book.change(known.id, _converted(change, KeyChange))
    text = f"{updated.id} {updated.name}: {_limit_text(updated.limits) or 'no limits'}"
    common.show(msgspec.to_builtins(updated), [text])


def revoke(common: Common, key: Which) -> None:
    """Revoke a key for good; requests that run come to their end."""
    with _book(common) as book:
        revoked = book.revoke(_find(book, key).id)
    common.show(msgspec.to_builtins(revoked), [f"{revoked.id} {revoked.name}: revoked"])


app.command("list")(with_common(list_))
for _command in (create, limit, revoke):
    app.command(_command.__name__)(with_common(_command))


@contextlib.contextmanager
def _book(common: Common) -> Generator[KeyBook]:
    from headrace.keys.book import KeyBook
    from headrace.keys.database import open_database

    config = common.settings(service=True).config
    book = KeyBook(open_database(config.server.database or "", config.home))
    try:
        yield book
    finally:
        book.close()


def _read(common: Common) -> Sequence[Account]:
    """Return all keys; a file that is not there is not created."""
    from headrace.keys.database import sqlite_path

    config = common.settings(service=True).config
    path = sqlite_path(config.server.database or "", config.home)
    if path is not None and not path.exists():
        return ()
    with _book(common) as book:
        return tuple(book.accounts().values())


def _find(book: KeyBook, text: str) -> Key:
    """Return the key with an id, or the only one with a name that is not revoked."""
    keys = [account.key for account in book.accounts().values()]
    for key in keys:
        if key.id == text:
            return key
    named = [key for key in keys if key.name == text and key.revoked is None]
    if len(named) != 1:
        problem = "There is no key" if not named else "There are several keys"
        raise UnknownKey(f"{problem} {text!r}; `headrace keys list` shows their ids.", param="key")
    return named[0]


def _has_admin(common: Common, book: KeyBook) -> bool:
    if common.settings(service=True).config.server.admin_keys:
        return True
    keys = (account.key for account in book.accounts().values())
    return any(key.scope == "admin" and key.revoked is None for key in keys)


def _limits(flags: LimitFlags) -> dict[str, int]:
    return {name: value for name, value in given(flags).items() if value != 0}


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _converted(values: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise refusal(error, kind) from None


def _row(account: Account, now: float) -> tuple[str | None, ...]:
    key, used = account.key, account.counts.at(now)
    return (
        key.id,
        key.name,
        key.scope,
        "revoked" if key.revoked is not None else "active",
        _limit_text(key.limits) or None,
        ", ".join(key.models) or None,
        str(used.day_requests) if key.limits.any else None,
        str(used.day_tokens) if key.limits.any else None,
        _time(key.last_used),
    )


def _limit_text(limits: Limits) -> str:
    return ", ".join(_limit_parts(limits))


def _limit_parts(limits: Limits) -> Iterable[str]:
    for name, value in msgspec.to_builtins(limits).items():
        kind, _, unit = name.partition("_per_")
        yield f"{value} {kind}/{_UNITS[unit]}" if unit else f"{value} {kind}"


def _time(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
