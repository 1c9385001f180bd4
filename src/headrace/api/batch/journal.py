"""Answers in a file: appended, each once, whatever ends the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from headrace.api.batch.lines import FIRST_BYTES, MAX_LINE, Answer, decode, encode
from headrace.core.private import FILE_MODE


class NotAnswers(Exception):
    """A file that has other lines than answers of a batch; `number` is the first of them."""

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number} is not an answer of a batch")
        self.number = number


class Journal:
    """A file of answers, opened or made, private to its owner.

    `take` gets the answers that it has. A last line that was not written to its end is cut off.

    Raises:
        NotAnswers: it has other lines, and is left as it is; without `strict`, it is cut off there.
        BlockingIOError: another process writes answers to it.
        OSError: it cannot be opened, read or changed.
    """

    def __init__(self, path: Path, take: Callable[[Answer], None], *, strict: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, FILE_MODE)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.size = self._read(take, strict=strict)
            os.ftruncate(self._file, self.size)
        except BaseException:
            self.close()
            raise

    def _read(self, take: Callable[[Answer], None], *, strict: bool) -> int:
        size = 0
        for number, data in enumerate(self._lines(), 1):
            whole = data.endswith(b"\n")
            answer = decode(data) if whole else None
            if answer is None:
                torn = not whole and data[: len(FIRST_BYTES)] == FIRST_BYTES[: len(data)]
                if strict and not torn:
                    raise NotAnswers(number)
                break
            take(answer)
            size += len(data)
        return size

    def _lines(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as file:
            while data := file.readline(2 * MAX_LINE):
                yield data

    def commit(self, answers: Sequence[Answer]) -> None:
        """Append answers, and wait until they are on the disk; all of them or none.

        Raises:
            OSError: the disk is full, or another fault of it.
        """
        data = memoryview(b"".join(map(encode, answers)))
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            _sync(self._file)
        except OSError:
            os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        # A pipe or a device has no disk.
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
