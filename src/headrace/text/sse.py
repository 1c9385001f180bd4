"""An incremental reader of server-sent events."""

from __future__ import annotations

from collections.abc import Iterator

LONGEST_EVENT = 1 << 20


class EventTooLong(ValueError):
    """An event is longer than the limit of the reader."""


class EventReader:
    """Reads the data of events from chunks of bytes; comments and other fields are skipped.

    Raises:
        EventTooLong: an event has more than `longest` bytes.
    """

    def __init__(self, longest: int = LONGEST_EVENT) -> None:
        self._longest = longest
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._size = 0
        self._after_return = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of each event that the chunk completes."""
        if self._after_return:
            chunk = chunk.removeprefix(b"\n")
        self._after_return = chunk.endswith(b"\r")
        for line in chunk.splitlines(keepends=True):
            self._line.append(line)
            self._size += len(line)
            if self._size > self._longest:
                raise EventTooLong("A server-sent event is too long.")
            if line.endswith((b"\n", b"\r")):
                yield from self._take()

    def rest(self) -> Iterator[bytes]:
        """Yield the data of a last event that the end of the stream completes."""
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
            if data:
                yield data
