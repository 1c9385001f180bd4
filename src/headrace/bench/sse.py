"""Cutting a stream of server-sent events into the data of each event."""

from __future__ import annotations

from collections.abc import Iterator

MOST_BYTES = 16 << 20


class Events:
    """Takes bytes as they come and gives the data of whole events; comments are left out.

    Lines end with LF or CRLF.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, more: bytes) -> Iterator[bytes]:
        """Yield the data of each event that is whole now.

        Raises:
            ValueError: a line has no end.
        """
        *lines, self._rest = (self._rest + more).split(b"\n")
        if len(self._rest) > MOST_BYTES:
            raise ValueError("a line without end")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []
