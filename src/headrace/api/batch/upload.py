"""A form with a file, written to the disk while it arrives."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from headrace.api.batch.work import finished
from headrace.api.bodies import ClientGone, too_large
from headrace.api.problems import refused
from headrace.core.errors import InvalidRequest
from headrace.core.private import FILE_MODE

MAX_FILE = 200 << 20
"""Bytes of a file of requests, as in OpenAI's API."""

UPLOAD_TIMEOUT_S = 900.0

_MAX_PARTS = 16
_MAX_FIELD = 1024
_MAX_OTHERS = 64 << 10
_AT_ONCE = 1 << 20

# Malformed forms are the client's, and answered.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class Upload:
    """The fields of a form so far; `data` is what has arrived of its file and is not written."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.data = bytearray()
        self.ended = False
        self._parts = 0
        self._field: str | None = None
        self._value = bytearray()
        self._header = self._disposition = b""
        self._content = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Take what has arrived.

        Raises:
            InvalidRequest: it is malformed, or has too many or too long fields.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The form is malformed: {error}.") from None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequest(f"The form has more than {_MAX_PARTS} parts.")
        self._header = self._content = self._disposition = b""
        self._value.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._content
        self._header = self._content = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if self._field == "file":
            if self.filename is not None:
                raise InvalidRequest("The form has two files.", param="file")
            name = options.get(b"filename", b"").decode(errors="replace")
            self.filename = name.replace("\\", "/").rpartition("/")[2][:255] or "file"

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self.data += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD:
            raise InvalidRequest(f"A field of the form has more than {_MAX_FIELD} bytes.")

    def _part_end(self) -> None:
        if self._field and self._field != "file":
            self.fields[self._field[:64]] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self.ended = True


async def save(
    receive: Receive, headers: dict[bytes, bytes], path: Path, grow: Callable[[int], None]
) -> tuple[Upload, int]:
    """Write the file of a form to `path`; return the form and the size of the file.

    `grow` is called with the size before that much is written, and may refuse it by raising.

    Raises:
        InvalidRequest: the body is no form, or is malformed.
        Refused: it is too large or too slow.
        ClientGone: the client left before its end.
        OSError: the file cannot be written.
    """
    kind, options = parse_options_header(headers.get(b"content-type", b""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("A file is sent as a form: Content-Type multipart/form-data.")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > MAX_FILE + _MAX_OTHERS:
        raise too_large(MAX_FILE)
    try:
        form = Upload(options[b"boundary"])
    except FormParserError as error:
        raise InvalidRequest(f"The form is malformed: {error}.") from None
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            return form, await _write(receive, form, file, grow)
    except TimeoutError:
        raise refused(408, "The file was not received in time.", "body_timeout") from None
    finally:
        os.close(file)


async def _write(receive: Receive, form: Upload, file: int, grow: Callable[[int], None]) -> int:
    size = 0
    async with aclosing(_parts(receive, form)) as parts:
        async for data in parts:
            size += len(data)
            grow(size)
            await finished(asyncio.to_thread(_write_all, file, data))
    if form.filename is None:
        raise InvalidRequest("The form has no file.", param="file")
    if not form.ended:
        raise InvalidRequest("The form ends too early.")
    await finished(asyncio.to_thread(os.fsync, file))
    return size


async def _parts(receive: Receive, form: Upload) -> AsyncGenerator[bytes]:
    """Yield the data of the file, as it arrives."""
    received, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        body = message.get("body", b"")
        received += len(body)
        if received > MAX_FILE + _MAX_OTHERS:
            raise too_large(MAX_FILE)
        form.feed(body)
        if form.data and (not more or len(form.data) >= _AT_ONCE):
            yield bytes(form.data)
            form.data.clear()


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
