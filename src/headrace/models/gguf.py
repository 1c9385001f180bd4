"""Reads and checks the header of a GGUF file, before any native library sees the file.

Every count, length and offset is checked against the size of the file. Vocabularies are skipped
and not kept, so the memory needed does not grow with the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import msgspec

from headrace.core.errors import LoadFailed
from headrace.models.files import open_regular
from headrace.models.gguf_types import ARRAY, BOOLEAN, SCALARS, STRING, TENSOR_TYPES

MAGIC = b"GGUF"
MAX_PAIRS = 65_536
MAX_TENSORS = 131_072
MAX_TEXTS = 4_194_304
"""Texts in all arrays together; the largest vocabularies and their merges have a million."""
MAX_KEPT_TEXT = 1 << 20
MAX_KEPT = 8 << 20
MAX_KEPT_ARRAY = 4096
MAX_VOCABULARY = 64 << 20
"""Bytes of the texts of all tokens, where they are needed."""
MAX_NAME = 65_535
_CHUNK = 1 << 18


class Skipped(msgspec.Struct, frozen=True):
    """The length of an array or a text that was checked and not kept.

    `longest` is the length in bytes of the longest text of an array.
    """

    length: int
    longest: int = 0


Value = int | float | bool | str | tuple[int | float, ...] | Skipped


@dataclass(frozen=True)
class GgufHeader:
    """A consistent header. `tensor_bytes` is by type; `size` is that of the file.

    `shapes` are those of the tensors by name, the fastest dimension first.
    """

    path: Path
    size: int
    version: int
    metadata: Mapping[str, Value]
    tensors: int
    parameters: int
    tensor_bytes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


class Tensor(NamedTuple):
    """One tensor: its shape, the number of its type, and its place in the file and size, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    place: int
    size: int


class Layout(NamedTuple):
    """Where the parts of a file are; `metadata` has the first byte of its `pairs`, and the end."""

    version: int
    pairs: int
    metadata: tuple[int, int]
    alignment: int
    tensors: tuple[Tensor, ...]


class _Cursor:
    """Reads forward through a file of known size, a chunk at a time."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._path = file, path
        self._buffer, self._offset = b"", 0
        self._end = 0  # the place in the file where the buffer ends
        self.size = size

    @property
    def place(self) -> int:
        """The next byte's place in the file."""
        return self._end - len(self._buffer) + self._offset

    @property
    def left(self) -> int:
        """How many bytes of the file follow."""
        return self.size - self.place

    def fail(self, reason: str) -> NoReturn:
        """Refuse the file."""
        raise LoadFailed(f"{self._path}: damaged GGUF: {reason}, at byte {self.place}.")

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.left:
            self.fail(f"{count} bytes are said to follow, but the file has {self.left} more")
        if len(self._buffer) - self._offset < count:
            rest = self._buffer[self._offset :]
            more = self._file.read(max(_CHUNK, count - len(rest)))
            self._buffer, self._offset = rest + more, 0
            self._end += len(more)
            if len(self._buffer) < count:
                self.fail("the file became shorter while it was read")
        self._offset += count
        return self._buffer[self._offset - count : self._offset]

    def skip(self, count: int) -> None:
        """Skip bytes."""
        if count > self.left:
            self.fail(f"{count} bytes are said to follow, but the file has {self.left} more")
        if self._offset + count <= len(self._buffer):
            self._offset += count
            return
        self._end = self._file.seek(self.place + count)
        self._buffer, self._offset = b"", 0

    def skip_texts(self, count: int) -> int:
        """Skip texts, each of which follows its length; return the longest length."""
        longest = 0
        for _ in range(count):
            at = self._offset
            # This runs a million times for a large vocabulary: no calls where the buffer has all.
            if at + 8 <= len(self._buffer):
                (length,) = _U64.unpack_from(self._buffer, at)
                if length > longest:
                    longest = length
                if at + 8 + length <= len(self._buffer):
                    self._offset = at + 8 + length
                    continue
            length = self.u64()
            longest = max(longest, length)
            self.skip(length)
        return longest

    def u32(self) -> int:
        """Return the next 4 bytes as a number."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """Return the next 8 bytes as a number."""
        return int.from_bytes(self.take(8), "little")

    def name(self, limit: int) -> str:
        """Return a name, which has to be short and UTF-8."""
        length = self.u64()
        if not 0 < length <= limit:
            self.fail(f"a name of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail("a name is not UTF-8")


_U64 = struct.Struct("<Q")


class _Metadata:
    """Reads the pairs of keys and values; of long arrays those of `wanted` keys are kept."""

    def __init__(self, cursor: _Cursor, wanted: Container[str] = ()) -> None:
        self._cursor = cursor
        self._wanted = wanted
        self.kept: dict[str, tuple[Any, ...]] = {}
        self._kept = 0
        self._texts = 0
        self.values: dict[str, Value] = {}

    def read(self, count: int) -> dict[str, Value]:
        for _ in range(count):
            key = self._cursor.name(MAX_NAME)
            if key in self.values:
                self._cursor.fail(f"the key {_shown(key)} is there twice")
            self._keep(len(key))
            kind = self._cursor.u32()
            if kind == ARRAY and key in self._wanted:
                self.kept[key] = self._whole_array(self._cursor.u32(), self._cursor.u64())
                self.values[key] = Skipped(len(self.kept[key]))
            else:
                self.values[key] = self._value(kind)
        return self.values

    def _whole_array(self, kind: int, length: int) -> tuple[Any, ...]:
        cursor = self._cursor
        if length > MAX_TEXTS or length > cursor.left:
            cursor.fail(f"an array of {length} values for the vocabulary")
        if kind != STRING:
            return self._scalars(kind, length)
        texts: list[bytes] = []
        size = 0
        for _ in range(length):
            size += (more := cursor.u64())
            if size > MAX_VOCABULARY:
                cursor.fail(f"more than {MAX_VOCABULARY} bytes of vocabulary")
            texts.append(cursor.take(more))
        return tuple(texts)

    def _keep(self, size: int) -> None:
        self._kept += size
        if self._kept > MAX_KEPT:
            self._cursor.fail(f"more than {MAX_KEPT} bytes of metadata beside the vocabulary")

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array(self._cursor.u32(), self._cursor.u64())
        return self._scalars(kind, 1)[0]

    def _text(self) -> Value:
        length = self._cursor.u64()
        if length > MAX_KEPT_TEXT:
            self._cursor.skip(length)
            return Skipped(length)
        self._keep(length)
        return self._cursor.take(length).decode(errors="replace")

    def _array(self, kind: int, length: int) -> Value:
        cursor = self._cursor
        if kind == STRING:
            self._texts += length
            if self._texts > MAX_TEXTS or length * 8 > cursor.left:
                cursor.fail(f"an array of {length} texts")
            return Skipped(length, cursor.skip_texts(length))
        if kind not in SCALARS:
            cursor.fail(f"an array of values of the unknown type {kind}")
        width = struct.calcsize("<" + SCALARS[kind])
        if length > MAX_KEPT_ARRAY:
            cursor.skip(length * width)
            return Skipped(length)
        self._keep(length * width)
        return self._scalars(kind, length)

    def _scalars(self, kind: int, count: int) -> tuple[int | float, ...]:
        code = SCALARS.get(kind)
        if code is None:
            self._cursor.fail(f"a value of the unknown type {kind}")
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack(self._cursor.take(layout.size))
        if kind != BOOLEAN:
            return values
        if any(value > 1 for value in values):
            self._cursor.fail("a truth value that is neither 0 nor 1")
        return tuple(value == 1 for value in values)


class _Tensors:
    """Reads the list of tensors; they have to follow each other without gaps, as in ggml."""

    def __init__(self, cursor: _Cursor, alignment: int) -> None:
        self._cursor, self._alignment = cursor, alignment
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._next = 0
        self._last_end = 0
        self.parameters = 0
        self.bytes: dict[str, int] = {}
        self.listed: list[Tensor] = []

    def read(self, count: int) -> None:
        for _ in range(count):
            self._tensor()
        if not count:
            return
        data = _aligned(self._cursor.place, self._alignment)
        missing = data + self._last_end - self._cursor.size
        if missing > 0:
            self._cursor.fail(f"the tensors go {missing} bytes beyond the end of the file")

    def _tensor(self) -> None:
        cursor = self._cursor
        name = cursor.name(63)
        if name in self.shapes:
            cursor.fail(f"the tensor {_shown(name)} is there twice")
        shape, kind, size = self._size(name)
        offset = cursor.u64()
        self.listed.append(Tensor(name, shape, kind, offset, size))
        if offset != self._next:
            cursor.fail(f"tensor {_shown(name)} starts at {offset} instead of {self._next}")
        self._last_end = offset + size
        self._next = _aligned(self._last_end, self._alignment)
        if self._last_end > cursor.size:
            cursor.fail(f"tensor {_shown(name)} has {size} bytes, more than the file")

    def _size(self, name: str) -> tuple[tuple[int, ...], int, int]:
        cursor = self._cursor
        rank = cursor.u32()
        if not 1 <= rank <= 4:
            cursor.fail(f"tensor {_shown(name)} has {rank} dimensions")
        shape = self.shapes[name] = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
        number = cursor.u32()
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            cursor.fail(f"tensor {_shown(name)} is of type {number}, which is unknown here")
        weights = math.prod(shape)
        if not 0 < weights < 1 << 62 or shape[0] % kind.block:
            cursor.fail(f"tensor {_shown(name)} has the impossible shape {shape}")
        size = weights // kind.block * kind.size
        self.parameters += weights
        self.bytes[kind.name] = self.bytes.get(kind.name, 0) + size
        return shape, number, size


def read_vocabulary(path: Path) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Return the tokens of a file as they are written in it, and their types; empty without.

    Raises:
        LoadFailed: as `read_header`.
    """
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    with open_regular(path) as (file, size):
        cursor = _Cursor(file, size, path)
        _version, _tensors, pairs = _counts(cursor)
        metadata = _Metadata(cursor, keys)
        metadata.read(pairs)
    return metadata.kept.get(keys[0], ()), metadata.kept.get(keys[1], ())


def read_header(path: Path) -> GgufHeader:
    """Read one file's header.

    Raises:
        LoadFailed: it is not a regular file, or its header is inconsistent.
    """
    with open_regular(path) as (file, size):
        return _read(_Cursor(file, size, path), path)


def read_layout(path: Path) -> Layout:
    """Return where the metadata and the tensors of one file are.

    Raises:
        LoadFailed: as `read_header`.
    """
    with open_regular(path) as (file, size):
        cursor = _Cursor(file, size, path)
        version, tensors, pairs = _counts(cursor)
        begin = cursor.place
        alignment = _alignment(cursor, _Metadata(cursor).read(pairs))
        end = cursor.place
        listing = _Tensors(cursor, alignment)
        listing.read(tensors)
        data = _aligned(cursor.place, alignment)
    moved = tuple(item._replace(place=data + item.place) for item in listing.listed)
    return Layout(version, pairs, (begin, end), alignment, moved)


def _read(cursor: _Cursor, path: Path) -> GgufHeader:
    version, tensors, pairs = _counts(cursor)
    metadata = _Metadata(cursor).read(pairs)
    listing = _Tensors(cursor, _alignment(cursor, metadata))
    listing.read(tensors)
    return GgufHeader(
        *(path, cursor.size, version, metadata, tensors),
        *(listing.parameters, listing.bytes, listing.shapes),
    )


def _counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Return the version, and the numbers of tensors and of pairs of metadata."""
    if cursor.take(4) != MAGIC:
        cursor.fail("it does not begin with GGUF")
    version = cursor.u32()
    if version not in (2, 3):
        big = version and version & 0xFFFF == 0
        cursor.fail("it is big-endian" if big else f"version {version} is not 2 or 3")
    tensors, pairs = cursor.u64(), cursor.u64()
    # 13 and 33 bytes are the least that a pair and a tensor can have.
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS or 13 * pairs + 33 * tensors > cursor.left:
        cursor.fail(f"{tensors} tensors and {pairs} pairs of metadata")
    return version, tensors, pairs


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
        cursor.fail(f"the alignment {value!r}"[:80])
    return value


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}…")
