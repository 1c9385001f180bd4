"""Failures of one model: back-off, the breaker, and the requests that may have caused a crash."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from headrace.core.errors import DoesNotFit, HeadraceError, LoadFailed, Quarantined, RateLimited
from headrace.core.request import AnyRequest, GenerateRequest, Request
from headrace.pool.policy import Rules, backoff_s
from headrace.pool.replica import Lease

T = TypeVar("T")

_OPEN_S, _LONGEST_OPEN_S = 30.0, 600.0
_REFUSED_S, _LONGEST_REFUSED_S, _REMEMBERED_S = 60.0, 3600.0, 7200.0
_REFUSAL = "{} ended the model's process repeatedly, and will be tried again later."
_MANY = 1024
# Two requests with the same fields but these are the same.
_BLANK = Request(id="", received=0.0)
_ENVELOPE = {name: getattr(_BLANK, name) for name in Request.__struct_fields__}


class Breaker:
    """Counts crashes; opens after too many within a window, and is half-open some time later.

    The time is 30 s, and doubles up to 600 s when it opens again soon. Half-open, one more crash
    opens it, and an answer closes it. Crashes with the same `culprits` count as one.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._open_s = 0.0
        self._is_half_open = False
        self._crashes: list[tuple[float, frozenset[str]]] = []

    def crashed(self, now: float, rules: Rules, culprits: frozenset[str] = frozenset()) -> None:
        """Count a crash of what `culprits` sent; without any it is the model's own."""
        if now < self.until:
            return
        # Of several suspects of an earlier crash, this one has caused it.
        sole = len(culprits) == 1
        self._crashes = [
            (at, others)
            for at, others in self._crashes
            if now - at <= rules.crash_window_s and not (sole and culprits <= others)
        ]
        self._crashes.append((now, culprits))
        if self._is_half_open or self._count() >= rules.crashes:
            self._open(now, rules)

    def answered(self, now: float) -> None:
        """Note an answer: the model works, so crashes that one culprit has caused do not count."""
        if self._crashes or self._is_half_open:
            self._is_half_open &= now < self.until
            self._crashes = [crash for crash in self._crashes if len(crash[1]) != 1]

    def _count(self) -> int:
        known = {culprits for _, culprits in self._crashes if culprits}
        return len(known) + sum(1 for _, culprits in self._crashes if not culprits)

    def _open(self, now: float, rules: Rules) -> None:
        is_soon = now - self.until <= self._open_s + rules.crash_window_s
        again = is_soon and self._open_s > 0
        self._open_s = min(2 * self._open_s, _LONGEST_OPEN_S) if again else _OPEN_S
        self.until, self._is_half_open = now + self._open_s, True
        self._crashes.clear()


@dataclass
class _Suspect:
    """The crashes during which a request ran; `was_alone` is whether nothing else did in one."""

    crashes: int = 0
    was_alone: bool = False
    runs_alone: bool = False
    refused_until: float = 0.0
    seen: float = 0.0


@dataclass
class _Client:
    """A client whose requests alone were running when a worker ended."""

    breaker: Breaker = field(default_factory=Breaker)
    alone_until: float = 0.0


class Suspects:
    """Requests that were running when a worker ended, by content, and the clients of such.

    A request that had no token yet runs alone when it is repeated, and so does one that was in two
    crashes. One that crashed a worker alone, after another crash, is refused for 60 s, which
    doubles up to an hour; a client with several crashes of its own is refused as by a `Breaker`.
    An answer clears a request.
    """

    def __init__(self) -> None:
        self._requests: OrderedDict[str, _Suspect] = OrderedDict()
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def admit(self, request: AnyRequest, now: float) -> bool:
        """Return whether a request has to run alone.

        Raises:
            Quarantined, RateLimited: it is refused, or all that its client sends, with the time
                until it is tried again.
        """
        client = self._clients.get(request.client)
        if client is not None and now < client.breaker.until:
            wait_s = client.breaker.until - now
            raise RateLimited(_REFUSAL.format("Requests of this key have"), retry_after_s=wait_s)
        while self._requests and next(iter(self._requests.values())).seen < now - _REMEMBERED_S:
            self._requests.popitem(last=False)
        suspect = self._requests.get(fingerprint(request)) if self._requests else None
        if suspect is not None and now < suspect.refused_until:
            wait_s = suspect.refused_until - now
            raise Quarantined(_REFUSAL.format("This request has"), retry_after_s=wait_s)
        is_near = client is not None and now < client.alone_until
        return is_near or (suspect is not None and suspect.runs_alone)

    def crashed(self, victims: Sequence[Lease], now: float, rules: Rules) -> frozenset[str]:
        """Record the requests that were running; return the clients or contents that may be why.

        Those without a token are suspected; if all had one, then all.
        """
        suspects = [lease for lease in victims if not lease.has_begun] or victims
        contents = {fingerprint(lease.request): lease.has_begun for lease in suspects}
        for content, has_begun in contents.items():
            suspect = _touch(self._requests, content, _Suspect)
            suspect.crashes, suspect.seen = suspect.crashes + 1, now
            suspect.was_alone |= len(victims) == 1
            suspect.runs_alone |= not has_begun or suspect.crashes > 1
            if suspect.was_alone and suspect.crashes > 1:
                doubled = _REFUSED_S * 2 ** min(suspect.crashes - 2, 10)
                suspect.refused_until = now + min(doubled, _LONGEST_REFUSED_S)
        clients = {lease.request.client for lease in suspects}
        if len(clients) == 1 and (name := clients.pop()):
            self._blame(name, now, rules, was_alone=len(victims) == 1)
        return frozenset(lease.request.client or fingerprint(lease.request) for lease in suspects)

    def has_begun(self, request: AnyRequest) -> bool:
        """Note the first token of a request that ran alone; return whether others need not.

        It has passed what it was suspected of, if it had no token yet when a worker ended.
        """
        suspect = self._requests.get(fingerprint(request)) if self._requests else None
        if suspect is None or suspect.crashes > 1:
            return False
        suspect.runs_alone = False
        return True

    def answered(self, request: AnyRequest) -> None:
        """Clear a request that has been answered."""
        if self._requests:
            self._requests.pop(fingerprint(request), None)

    def _blame(self, name: str, now: float, rules: Rules, *, was_alone: bool) -> None:
        client = _touch(self._clients, name, _Client)
        client.breaker.crashed(now, rules)
        if was_alone:
            client.alone_until = now + rules.crash_window_s


def _touch(known: OrderedDict[str, T], key: str, make: Callable[[], T]) -> T:
    """Return the entry of a key, as the latest; the oldest of too many is forgotten."""
    value = known.setdefault(key, make())
    known.move_to_end(key)
    if len(known) > _MANY:
        known.popitem(last=False)
    return value


def fingerprint(request: AnyRequest) -> str:
    """Return a digest of what a request asks for, without its envelope."""
    bare: dict[str, Any] = dict(_ENVELOPE)
    if hasattr(request, "answered"):
        bare["answered"] = ()
    if isinstance(request, GenerateRequest):
        # The messages have their digests.
        bare["media"] = dict.fromkeys(request.media, b"")
    text = repr(msgspec.structs.replace(request, **bare))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Failures:
    """The failure history of a model.

    `error` is the present failure, `last_error` the latest one with its detail. No load begins
    before `retry_at`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.error: HeadraceError | None = None
        self.last_error: str | None = None
        self.retry_at = 0.0
        self._clock = clock
        self._clear()

    def _clear(self) -> None:
        self._count = self._failed_loads = 0
        self.breaker = Breaker()
        self.suspects = Suspects()

    @property
    def is_open(self) -> bool:
        """Whether the breaker is open: nothing is loaded until `retry_at`."""
        return self._clock() < self.breaker.until

    @property
    def wait_s(self) -> float:
        """How many seconds requests are refused from now on."""
        return 0.0 if self.error is None else max(0.0, self.retry_at - self._clock())

    def refusal(self, name: str) -> LoadFailed:
        """Return the error for requests while the model has failed."""
        message = self.error.message if self.error else "it has crashed"
        return LoadFailed(f"{name} has failed: {message}", retry_after_s=self.wait_s or None)

    def load_failed(self, error: HeadraceError, rules: Rules, *, counts: bool) -> None:
        """Record a failed load. A lack of memory is not a failure of the model."""
        self.last_error = _described(error)
        if not isinstance(error, DoesNotFit):
            self._failed_loads += 1
            self._failed(error, rules, counts=counts)

    def loads_again(self, rules: Rules) -> bool:
        """Whether a load that has failed is tried again at once, after `retry_at`."""
        return not self.is_open and self._failed_loads < rules.crashes

    def loaded(self) -> None:
        """Note that a load has succeeded."""
        self._failed_loads = 0
        if not self.is_open:
            self.recovered()

    def crashed(
        self, error: HeadraceError, rules: Rules, *, up_s: float, victims: Sequence[Lease]
    ) -> None:
        """Record that a worker has died after `up_s` seconds, with these requests."""
        if up_s > rules.crash_window_s:
            self._count = 0
        self.last_error = _described(error)
        culprits = self.suspects.crashed(victims, self._clock(), rules)
        self._failed(error, rules, culprits=culprits)

    def _failed(
        self,
        error: HeadraceError,
        rules: Rules,
        *,
        counts: bool = True,
        culprits: frozenset[str] = frozenset(),
    ) -> None:
        now = self._clock()
        self.error = error
        if counts:
            # A crash of one client's making does not delay the others.
            self._count += len(culprits) != 1
            self.breaker.crashed(now, rules, culprits)
        if not self.is_open:
            self.retry_at = now + backoff_s(max(1, self._count))
        else:
            self.retry_at = self.breaker.until

    def answered(self, request: AnyRequest) -> None:
        """Note that a request has been answered."""
        self.suspects.answered(request)
        self.breaker.answered(self._clock())

    def recovered(self) -> None:
        """Clear the failure, as a worker is loaded or is about to be; the history is kept."""
        self.error = None

    def reset(self) -> None:
        """Clear the failure and its history."""
        self.error, self.retry_at = None, 0.0
        self._clear()


def _described(error: HeadraceError) -> str:
    return f"{error.message}\n{error.detail}" if error.detail else error.message
