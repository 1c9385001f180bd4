"""Embeddings and orders from an upstream, with the figures of each request."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from typing import TypeVar

from headrace.core.errors import DeadlineExceeded, UpstreamError
from headrace.core.metrics import Usage
from headrace.core.request import (
    EmbedRequest,
    EmbedResult,
    Ranked,
    RerankRequest,
    RerankResult,
)
from headrace.engines.remote import estimate
from headrace.worker.remote_answer import Account, Connected, check_task

log = logging.getLogger("headrace.worker")
T = TypeVar("T")


async def embed(connected: Connected, request: EmbedRequest) -> EmbedResult:
    """Return a vector for each input.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    account = Account(connected, request)
    guess = sum(estimate(one) if isinstance(one, str) else len(one) for one in request.inputs)
    try:
        check_task(connected, "embed")
        vectors, usage = await _turn(connected, account, lambda: connected.engine.embed(request))
        size = len(vectors[0]) // 4
        if any(len(vector) != 4 * size for vector in vectors):
            raise UpstreamError("The upstream gave vectors of different lengths.")
        if request.dimensions not in (None, size):
            raise UpstreamError(f"The upstream gave {size} dimensions.")
        if request.normalize:
            vectors = await asyncio.to_thread(lambda: tuple(map(_unit, vectors)))
        _settle(account, usage, guess)
        metrics = account.metrics()
        return EmbedResult(
            vectors=tuple(vectors), dimensions=size, usage=metrics.usage, metrics=metrics
        )
    except Exception as error:  # noqa: BLE001  # a library can raise anything; see `failed`
        raise account.failed(error) from None
    finally:
        log.info("headrace.request", extra={"data": account.record()})


async def rerank(connected: Connected, request: RerankRequest) -> RerankResult:
    """Put documents in order.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    account = Account(connected, request)
    guess = sum(map(estimate, (request.query, *request.documents)))
    try:
        check_task(connected, "rerank")
        ranked, usage = await _turn(connected, account, lambda: connected.engine.rerank(request))
        _settle(account, usage, guess)
        metrics = account.metrics()
        ranking = tuple(Ranked(index, score) for index, score in ranked)
        return RerankResult(ranking=ranking, usage=metrics.usage, metrics=metrics)
    except Exception as error:  # noqa: BLE001  # a library can raise anything; see `failed`
        raise account.failed(error) from None
    finally:
        log.info("headrace.request", extra={"data": account.record()})


async def _turn(connected: Connected, account: Account, ask: Callable[[], Awaitable[T]]) -> T:
    """Wait for a slot and then for the upstream, until the deadline."""
    admission = connected.admission
    entered = await admission.enter(account.deadline)
    account.meter.admitted(0, 0)
    left = None if account.deadline is None else account.deadline - time.monotonic()
    limit = asyncio.timeout(left)
    try:
        async with limit:
            return await ask()
    except TimeoutError:
        if not limit.expired():
            raise
    finally:
        admission.leave(entered)
    raise DeadlineExceeded("The deadline passed before the answer was complete.")


def _settle(account: Account, usage: Usage, guess: int) -> None:
    account.outcome = "stop"
    account.settle(usage if usage.prompt_tokens else Usage(prompt_tokens=guess))


def _unit(vector: bytes) -> bytes:
    """Return a vector of length 1, if it has a length at all."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    length = math.hypot(*values)
    if not math.isfinite(length):
        raise UpstreamError("The upstream gave a vector that is not made of numbers.")
    if length == 0.0 or abs(length - 1.0) < 1e-6:
        return vector
    scaled = array("f", [value / length for value in values])
    if sys.byteorder == "big":
        scaled.byteswap()
    return scaled.tobytes()
