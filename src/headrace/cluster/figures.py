"""The figures of an answer from a node, as the front's clock has them."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from headrace.core.errors import HeadraceError
from headrace.core.events import Delta, Finish
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import AnyRequest


class Received:
    """What the front has received of one stream; times are those of its clock.

    A node counts from the time when the front received the request, by its own clock; what is
    missing are the ways there and back, and its wall clock may be another.
    """

    __slots__ = ("_clock", "_request", "_visible_at", "is_visible")

    def __init__(self, request: AnyRequest, clock: Callable[[], float]) -> None:
        self._request = request
        self._clock = clock
        self._visible_at: float | None = None
        self.is_visible = False

    def saw(self, delta: Delta) -> None:
        """Note a delta that may be the first with text."""
        if delta.text or delta.reasoning:
            self._visible_at, self.is_visible = self._clock(), True

    def corrected(self, finish: Finish, node: str) -> Finish:
        """Return a Finish with the figures as of this clock."""
        return msgspec.structs.replace(finish, metrics=self._corrected(finish.metrics, node))

    def failed(self, error: HeadraceError, node: str) -> HeadraceError:
        """Return an error with its figures as of this clock."""
        if error.metrics is not None:
            error.metrics = self._corrected(error.metrics, node)
        return error

    def _corrected(self, metrics: InferenceMetrics, node: str) -> InferenceMetrics:
        now, received = self._clock(), self._request.received
        total_ms = (now - received) * 1000
        changes: dict[str, object] = {
            "started_at": time.time() - (now - received),
            "total_ms": max(metrics.total_ms, total_ms),
            "worker": f"{node}/{metrics.worker}" if metrics.worker else node,
        }
        first = metrics.time_to_first_token_ms
        if first is not None and self._visible_at is not None:
            late_ms = max(0.0, (self._visible_at - received) * 1000 - first)
            changes["time_to_first_token_ms"] = first + late_ms
            if metrics.time_to_first_content_ms is not None:
                content_ms = metrics.time_to_first_content_ms + late_ms
                changes["time_to_first_content_ms"] = content_ms
        return msgspec.structs.replace(metrics, **changes)
