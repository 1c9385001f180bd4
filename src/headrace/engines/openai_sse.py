"""Server-sent events from bytes that come in any pieces."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.core.errors import UpstreamError

LONGEST_EVENT = 1 << 20


class EventReader:
    """Finds the data of events; comments and other fields are passed over.

    Raises:
        UpstreamError: an event is longer than any honest one.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._size = 0
        self._after_return = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of each event that is whole now."""
        if self._after_return:
            chunk = chunk.removeprefix(b"\n")
        self._after_return = chunk.endswith(b"\r")
        for line in chunk.splitlines(keepends=True):
            self._line.append(line)
            self._size += len(line)
            if self._size > LONGEST_EVENT:
                raise UpstreamError("The upstream sent an event that is too long.")
            if line.endswith((b"\n", b"\r")):
                yield from self._take()

    def rest(self) -> Iterator[bytes]:
        """Yield the data of an event that ended with the stream."""
        yield from self._take()
        yield from self._event()

    def _take(self) -> Iterator[bytes]:
        line = b"".join(self._line).rstrip(b"\r\n")
        self._line.clear()
        if not line:
            yield from self._event()
        elif line.startswith(b":"):
            self._size = sum(map(len, self._data))
        else:
            name, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))

    def _event(self) -> Iterator[bytes]:
        self._size = 0
        if self._data:
            data, self._data = b"\n".join(self._data), []
            yield data
