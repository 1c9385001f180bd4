"""Headers of sounds, and what a decoder gets of them (Issue 13, audio input)."""

from __future__ import annotations

import io
import math
import struct
import wave

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sounds_made import broken, counted_mp3, flac, mp3, wav

from headrace.core.audio import MAX_AUDIO_SECONDS, is_sound, read_sound
from headrace.core.errors import InvalidRequest
from headrace.core.media import MAX_IMAGE_BYTES, MAX_IMAGES, Audio, Pictures, known_as, text_of

TAG = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
STEREO = wav(0.5, 48000, channels=2)
FRAME_S = 1152 / 44100


def chunked(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def fmt(code: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16) -> bytes:
    # The rate of bytes and the size of a block are wrong: they are not read.
    return struct.pack("<HHIIHH", code, channels, rate, 1, 1, bits)


def floats(value: float, kind: str = "f") -> bytes:
    data = struct.pack(f"<4000{kind}", *[0.5] * 3999, value)
    return chunked((b"fmt ", fmt(3, bits=8 * struct.calcsize(kind))), (b"data", data))


EXTENSIBLE = fmt(0xFFFE) + struct.pack("<HHI", 22, 16, 4) + struct.pack("<H", 1) + bytes(14)


@pytest.mark.parametrize(
    ("data", "kind", "seconds"),
    [
        (wav(1), "wav", 1),
        (STEREO, "wav", 0.5),
        (chunked((b"LIST", b"abc\0"), (b"fmt ", EXTENSIBLE), (b"data", bytes(16000))), "wav", 0.5),
        (chunked((b"fmt ", fmt(3, bits=32)), (b"data", bytes(32000))), "wav", 0.5),
        (floats(-9.5, "d"), "wav", 0.25),
        (wav(1)[:40] + b"\xff" * 4 + wav(1)[44:], "wav", 1),
        (flac(8000), "flac", 0.5),
        (mp3(20), "mp3", 20 * FRAME_S),
        (TAG + mp3(20) + b"TAG" + bytes(125), "mp3", 20 * FRAME_S),
        (counted_mp3(1 << 31), "mp3", 20 * FRAME_S),
        (mp3(20)[:-9], "mp3", 19 * FRAME_S),
    ],
)
def test_format_and_length(data: bytes, kind: str, seconds: float) -> None:
    sound = read_sound(data)
    assert (sound.format, sound.seconds) == (kind, pytest.approx(seconds))
    assert is_sound(data)
    again = read_sound(sound.plain(data))
    assert again.seconds == pytest.approx(seconds)
    assert again.plain(sound.plain(data)) == sound.plain(data)


def test_a_decoder_gets_nothing_but_samples() -> None:
    """What a file says of its own length, and further formats in it, decoders would believe."""
    assert read_sound(counted_mp3(1 << 31)).plain(counted_mp3(1 << 31)) == mp3(20)
    # A decoder takes the first frame that it can decode: it may be a later one.
    late = mp3(2) + counted_mp3(1 << 31) + counted_mp3(7)
    assert read_sound(late).plain(late) == mp3(42)
    assert read_sound(TAG + mp3(20)).plain(TAG + mp3(20)) == mp3(20)
    padded = b"fLaC\x00\x00\x00\x22" + flac()[8:42] + b"\x84\0\0\x09" + mp3(1)[:9] + flac()[42:]
    assert read_sound(padded).plain(padded) == flac()
    data = chunked((b"fact", bytes(8)), (b"fmt ", EXTENSIBLE), (b"data", bytes(4001)))
    with wave.open(io.BytesIO(read_sound(data).plain(data))) as plain:
        assert (plain.getnframes(), plain.getframerate(), plain.getnchannels()) == (2000, 16000, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not audio"),
        (b"OggS" + bytes(60), "not audio in WAV, MP3 or FLAC"),
        (chunked((b"fmt ", fmt(2)), (b"data", bytes(9000))), "compressed"),
        (chunked((b"fmt ", fmt(bits=12)), (b"data", bytes(9000))), "unknown size"),
        (chunked((b"fmt ", fmt(channels=0)), (b"data", bytes(9000))), "channels"),
        (chunked((b"fmt ", fmt(channels=999)), (b"data", bytes(9000))), "channels"),
        (chunked((b"fmt ", fmt(rate=1)), (b"data", bytes(9000))), "samples a second"),
        (chunked((b"data", bytes(9000)), (b"fmt ", fmt())), "no format"),
        (floats(math.nan), "no numbers"),
        (floats(-math.inf), "no numbers"),
        (floats(2e5), "no numbers, or beyond 100000"),
        (floats(1e300, "d"), "no numbers"),
        (chunked(*[(b"JUNK", b"")] * 2000), "no format"),
        (wav(0.05), "shorter than 0.1 s"),
        (chunked((b"fmt ", fmt()), (b"data", bytes(32000 * 301))), "longer than 300 s"),
        (flac(8000, 1), "samples a second"),
        (flac(0xFFFF)[:21] + b"\xff" * 5 + flac()[26:], "longer than 300 s"),
        (b"fLaC\x80\0\0\x22" + bytes(90), "no length"),
        (b"fLaC\x84\0\0\x22" + bytes(90), "does not begin"),
        (mp3(3), "shorter"),
        (mp3(1) * 12000, "longer than 300 s"),
        (mp3(3) + mp3(9, b"\xff\xf3\x90\xc0"), "shorter"),
        (mp3(3, b"\xff\xfb\x00\xc0"), "no frame"),
        (TAG, "ends within"),
    ],
)
def test_what_is_damaged_or_beyond_a_bound_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sound(data)


@given(st.binary(max_size=60), st.sampled_from([*broken(), STEREO, flac(), mp3(9), TAG]))
def test_any_bytes_are_read_or_refused(tail: bytes, start: bytes) -> None:
    for data in (start[: len(tail) * 3] + tail, start[:30] + tail + start[30:]):
        try:
            sound = read_sound(data)
        except ValueError as error:
            assert str(error)
        else:
            assert 0.1 <= sound.seconds <= MAX_AUDIO_SECONDS
            assert len(sound.plain(data)) <= len(data) + 44


def test_the_bounds_of_a_request() -> None:
    pictures = Pictures()
    first = pictures.add_audio(wav(1), "a")
    assert first == Audio(first.digest, "wav", len(wav(1)), 1.0, "a")
    assert first.tokens == 750
    assert text_of(("x", first), "<>") == "x<>"
    assert known_as(("x", first)) == f"x{first.digest}"
    long = chunked((b"fmt ", fmt()), (b"data", bytes(32000 * 299)))
    assert pictures.add_audio(long, "b").tokens == 7500
    with pytest.raises(InvalidRequest, match="together are longer than 300 s") as caught:
        pictures.again(first, "c")
    assert caught.value.param == "c"
    with pytest.raises(InvalidRequest, match="have more than"):
        pictures.add_audio(wav(1) + bytes(MAX_IMAGE_BYTES), "d")
    with pytest.raises(InvalidRequest, match=f"At most {MAX_IMAGES} images and sounds"):
        many = Pictures()
        for _ in range(MAX_IMAGES + 1):
            many.add_audio(wav(0.2), "e")
