"""/admin/overview and /admin/history: what a dashboard shows, cheap enough to be polled."""

from __future__ import annotations

import time

import msgspec
from msgspec.structs import replace

from headrace import __version__
from headrace.api.exchange import Exchange, Service
from headrace.api.pages import tag_of, unchanged
from headrace.core.errors import Unsupported
from headrace.core.record import Activity, Monitor, Rates, RunningRequest
from headrace.core.status import DeviceStatus, ModelStatus

MAX_RUNNING = 200
_KEPT_S = 0.9
_STEP = 128 << 20


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The models, the devices, the running requests and the rates of each model, at one time.

    `running` are the oldest 200 of `running_count` requests. The free memory of a device is in
    steps of 128 MiB.
    """

    version: str
    models: tuple[ModelStatus, ...]
    devices: tuple[DeviceStatus, ...]
    running: tuple[RunningRequest, ...]
    running_count: int
    rates: tuple[Rates, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """An encoded overview, with its entity tag and when it was made (monotonic seconds)."""

    body: bytes
    tag: bytes
    made: float


async def overview(service: Service, exchange: Exchange) -> None:
    """Show models, devices, running requests and rates in one answer, with an ETag for polling."""
    snapshot = _snapshot(service)
    headers = ((b"etag", snapshot.tag), (b"cache-control", b"no-cache"))
    if not await unchanged(exchange, snapshot.tag, headers):
        await exchange.reply(snapshot.body, headers=headers)


async def history(service: Service, exchange: Exchange) -> None:
    """Show samples of the last 15 minutes: requests, rates and memory, for charts."""
    await exchange.answer(observer(service).history())


def observer(service: Service) -> Monitor:
    """Return the observer of a service.

    Raises:
        Unsupported: there is none.
    """
    if service.observer is None:
        raise Unsupported("This service does not observe its requests.")
    return service.observer


def _snapshot(service: Service) -> Snapshot:
    """Return the overview, made at most about once a second for all that request it."""
    now, last = time.monotonic(), service.kept
    if isinstance(last, Snapshot) and now - last.made < _KEPT_S:
        return last
    body = msgspec.json.encode(_overview(service))
    service.kept = snapshot = Snapshot(body, tag_of(body), now)
    return snapshot


def _steady(device: DeviceStatus) -> DeviceStatus:
    """Return a device with its free memory in steps, so that the tag of an idle service stays."""
    return replace(device, free=device.free // _STEP * _STEP)


def _overview(service: Service) -> Overview:
    assert service.admin is not None
    status = service.admin.status()
    activity = service.observer.activity() if service.observer else Activity()
    return Overview(
        version=__version__,
        models=status.models,
        devices=tuple(map(_steady, status.devices)),
        running=activity.running[:MAX_RUNNING],
        running_count=len(activity.running),
        rates=activity.rates,
    )
