"""/admin/keys: the keys of the database; a key is shown once, when it is created."""

from __future__ import annotations

import msgspec
from msgspec.structs import asdict

from headrace.api.exchange import Exchange, Service
from headrace.core.errors import InvalidRequest
from headrace.core.keys import Account, Counts, Key, KeyChange, KeyStore, NewKey

_NEW = msgspec.json.Decoder(NewKey)
_CHANGE = msgspec.json.Decoder(KeyChange)


class KeyState(Key, frozen=True, kw_only=True):
    """A key, and what it has used in this minute and today, by the clock in UTC."""

    used: Counts


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """All keys, also those that were revoked, oldest first. Those of the file are not listed."""

    data: list[KeyState]


class CreatedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was created. `key` is to be kept by its user: it is not shown again."""

    key: str
    created: Key


async def show_all(service: Service, exchange: Exchange) -> None:
    """List the keys of the database, without the keys themselves."""
    keys = _keys(service)
    now = keys.now()
    await exchange.answer(KeyList(data=[_state(each, now) for each in await keys.list()]))


async def create(service: Service, exchange: Exchange) -> None:
    """Create a key; the answer alone has it in plain."""
    keys = _keys(service)
    new = await exchange.read(_NEW)
    is_managed = new.scope == "admin" or bool(exchange.settings.admin_keys)
    if not (is_managed or any(_is_admin(each.key) for each in await keys.list())):
        raise InvalidRequest(
            "The first key is an admin's: from then on each request needs a key, "
            "and without it no more could be created here.",
            param="scope",
        )
    key, created = await keys.create(new, exchange.call.client)
    await exchange.answer(CreatedKey(key=key, created=created))


async def change(service: Service, exchange: Exchange) -> None:
    """Change name, limits or allowed models of a key; what has been used stays counted."""
    wire = await exchange.read(_CHANGE)
    id: str = exchange.scope["path_params"]["id"]
    await exchange.answer(await _keys(service).change(id, wire, exchange.call.client))


async def revoke(service: Service, exchange: Exchange) -> None:
    """Revoke a key for good; requests that run come to their end."""
    id: str = exchange.scope["path_params"]["id"]
    await exchange.answer(await _keys(service).revoke(id, exchange.call.client))


def _keys(service: Service) -> KeyStore:
    assert service.keys is not None
    return service.keys


def _state(account: Account, now: float) -> KeyState:
    return KeyState(**asdict(account.key), used=account.counts.at(now))


def _is_admin(key: Key) -> bool:
    return key.scope == "admin" and key.revoked is None
