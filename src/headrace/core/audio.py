"""Sounds in messages: format and length by their headers, and the form that a decoder gets.

Nothing is decoded here: that is left to the process of the model. Decoders believe what a file says
of its length, and look for other formats in what they cannot read. So they get a file whose header
is written here, and of which nothing but the samples is the client's.
"""

from __future__ import annotations

import math
import struct
from typing import Literal, NamedTuple

MAX_AUDIO_SECONDS = 300
"""Of all sounds of a request."""

AudioFormat = Literal["wav", "mp3", "flac"]

_LEAST_SECONDS = 0.1
_RATES = range(8000, 192_001)
_MAX_CHUNKS = 1024
_MAX_CHANNELS = 8
_LOUDEST = 100_000
_EXTENSIBLE = 0xFFFE
_PCM, _FLOAT = 1, 3
_BITS = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
_STREAMINFO = 34

# Of an MP3's frame by its version (3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5), in kbit/s and Hz.
_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_ITS_KIND = 0xFFFE0C00
_COUNTED = (b"Xing", b"Info")
# After header, perhaps a checksum, and side information, whose size has the version and channels.
_COUNTED_AT = tuple(head + side for head in (4, 6) for side in (9, 17, 32))


class Sound(NamedTuple):
    """A sound by its header: what its decoder gets is `head` and the bytes of `spans`."""

    format: AudioFormat
    seconds: float
    head: bytes
    spans: tuple[tuple[int, int], ...]

    def plain(self, data: bytes) -> bytes:
        """Return the file for the decoder, of the file `data` that was read."""
        return self.head + b"".join(data[start:end] for start, end in self.spans)


def is_sound(data: bytes) -> bool:
    """Whether a file begins like a sound of a known format."""
    return _is_wav(data) or _is_mp3(data) or data.startswith(b"fLaC")


def _is_wav(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WAVE"


def _is_mp3(data: bytes) -> bool:
    return data.startswith(b"ID3") or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")


def read_sound(data: bytes) -> Sound:
    """Return what a file is by its bytes; the length is the most that its decoder makes of it.

    Raises:
        ValueError: it is none of the known formats, its header is damaged, or it is too short or
            too long.
    """
    try:
        sound = _read(data)
    except IndexError:
        raise ValueError("the audio ends within its header") from None
    if sound.seconds < _LEAST_SECONDS:
        raise ValueError(f"the audio is shorter than {_LEAST_SECONDS:g} s")
    if sound.seconds > MAX_AUDIO_SECONDS:
        raise ValueError(f"the audio is longer than {MAX_AUDIO_SECONDS} s")
    return sound


def _read(data: bytes) -> Sound:
    if _is_wav(data):
        return _wav(data)
    if data.startswith(b"fLaC"):
        return _flac(data)
    if _is_mp3(data):
        return _mp3(data)
    raise ValueError("not audio in WAV, MP3 or FLAC")


def _piece(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise IndexError
    return data[start : start + size]


def _big(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(_piece(data, start, size), "big")


def _little(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(_piece(data, start, size), "little")


def _wav(data: bytes) -> Sound:
    place, form = 12, b""
    for _ in range(_MAX_CHUNKS):
        kind, size = _piece(data, place, 4), _little(data, place + 4, 4)
        place += 8
        if kind == b"fmt ":
            form = _piece(data, place, size)
        elif kind == b"data":
            if not form:
                break
            return _samples(data, form, place, min(size, len(data) - place))
        place += size + (size & 1)
    raise ValueError("the WAV has no format before its samples")


def _samples(data: bytes, form: bytes, start: int, size: int) -> Sound:
    """Return a WAV with this format, whose samples have `size` bytes from `start` on."""
    code, channels, rate = (_little(form, at, width) for at, width in ((0, 2), (2, 2), (4, 4)))
    bits = _little(form, 14, 2)
    if code == _EXTENSIBLE:
        code = _little(form, 24, 2)
    if bits not in _BITS.get(code, ()):
        raise ValueError("the WAV has compressed samples, or of an unknown size")
    _check(rate, channels)
    block = channels * bits // 8
    size -= size % block
    if code == _FLOAT:
        _check_floats(memoryview(data)[start : start + size].cast("f" if bits == 32 else "d"))
    fields = struct.pack("<HHIIHH", code, channels, rate, rate * block, block, bits)
    head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + fields
    head += b"data" + struct.pack("<I", size)
    return Sound("wav", size / block / rate, head, ((start, start + size),))


def _check_floats(samples: memoryview[float]) -> None:
    # What is no number would be none in each layer, and in the model's cache.
    is_finite = math.isfinite(sum(samples))
    if samples and not (is_finite and min(samples) >= -_LOUDEST and max(samples) <= _LOUDEST):
        raise ValueError(f"the WAV has samples that are no numbers, or beyond {_LOUDEST}")


def _flac(data: bytes) -> Sound:
    if _big(data, 4, 1) & 0x7F or _big(data, 5, 3) != _STREAMINFO:
        raise ValueError("the FLAC does not begin with its header")
    info = _piece(data, 8, _STREAMINFO)
    shortest, longest, bits = _big(info, 0, 2), _big(info, 2, 2), _big(info, 10, 8)
    samples, rate, channels = bits & (1 << 36) - 1, bits >> 44, (bits >> 41 & 7) + 1
    if not samples or not 16 <= shortest <= longest:
        raise ValueError("the FLAC has no length in its header")
    _check(rate, channels)
    # The other blocks of metadata are left out.
    head = b"fLaC\x80" + _STREAMINFO.to_bytes(3, "big") + info
    return Sound("flac", samples / rate, head, ((_frames(data), len(data)),))


def _frames(data: bytes) -> int:
    """Return where the frames of a FLAC begin."""
    place = 4
    for _ in range(_MAX_CHUNKS):
        is_last = _big(data, place, 1) & 0x80
        place += 4 + _big(data, place + 1, 3)
        if is_last:
            return place
    raise ValueError("the FLAC has too many blocks of metadata")


def _mp3(data: bytes) -> Sound:
    start = place = _after_tag(data) if data.startswith(b"ID3") else 0
    first, seconds, spans = _big(data, place, 4), 0.0, list[tuple[int, int]]()
    while place + 4 <= len(data) and seconds <= MAX_AUDIO_SECONDS:
        frame = _big(data, place, 4)
        # A decoder that loses its way searches for frames of any kind: all are alike here.
        if (frame ^ first) & _ITS_KIND:
            break
        size, length = _frame(frame)
        if place + size > len(data):
            break
        if any(data[place + at : place + at + 4] in _COUNTED for at in _COUNTED_AT):
            # It says how many frames there are: a decoder would believe it.
            spans.append((start, place))
            start = place + size
        else:
            seconds += length
        place += size
    return Sound("mp3", seconds, b"", (*spans, (start, place)))


def _frame(header: int) -> tuple[int, float]:
    """Return size in bytes and length in seconds of an MP3's frame.

    Raises:
        ValueError: it is not the header of one.
    """
    version, kbits, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    is_frame = header >> 21 == 0x7FF and header >> 17 & 3 == 1 and version != 1
    if not is_frame or kbits in (0, 15) or rate == 3:
        raise ValueError("the MP3 has no frame at its start, or a damaged one")
    hertz, samples = _MP3_RATES[version][rate], 1152 if version == 3 else 576
    bits = 1000 * _KBITS[version or 2][kbits] * samples
    return bits // 8 // hertz + (header >> 9 & 1), samples / hertz


def _after_tag(data: bytes) -> int:
    """Return where an ID3v2 tag ends."""
    size = 0
    for byte in _piece(data, 6, 4):
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _check(rate: int, channels: int) -> None:
    # A decoder makes 16,000 samples of each second, however few the file has.
    if rate not in _RATES:
        raise ValueError(f"the audio has not {_RATES[0]} to {_RATES[-1]} samples a second")
    if not 1 <= channels <= _MAX_CHANNELS:
        raise ValueError(f"the audio has not 1 to {_MAX_CHANNELS} channels")
