"""Sounds and an audio projector of random weights, made by the tests."""

from __future__ import annotations

import base64
import io
import math
import random
import struct
import wave
from pathlib import Path
from typing import Any

from tests.models.builders import BOOL, F32, STRING, U32, Pair, gguf


def wav(seconds: float = 1.0, rate: int = 16000, *, seed: int = 1, channels: int = 1) -> bytes:
    """Return a WAV of some tones."""
    tones = [random.Random(seed).randrange(200, 3000) for _ in range(3)]
    samples = (
        sum(math.sin(2 * math.pi * tone * at / rate) for tone in tones)
        for at in range(int(seconds * rate))
    )
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        data = b"".join(struct.pack("<h", int(9000 * sample)) * channels for sample in samples)
        sound.writeframes(data)
    return file.getvalue()


def flac(samples: int = 8000, rate: int = 16000, *, level: int = 9) -> bytes:
    """Return a FLAC of one frame, whose samples are all `level`."""
    info = struct.pack(">HH", samples, samples) + bytes(6)
    info += (rate << 44 | 15 << 36 | samples).to_bytes(8, "big") + bytes(16)
    frame = b"\xff\xf8\x75\x08\x00" + struct.pack(">H", samples - 1)
    frame += bytes([_crc8(frame)]) + b"\x00" + struct.pack(">h", level)
    return b"fLaC\x80\x00\x00\x22" + info + frame + struct.pack(">H", _crc16(frame))


def mp3(frames: int = 20, header: bytes = b"\xff\xfb\x90\xc0") -> bytes:
    """Return a silent MP3 of frames of 128 kbit/s at 44,100 Hz, mono: 26 ms each."""
    return (header + bytes(413)) * frames


def counted_mp3(count: int, frames: int = 20) -> bytes:
    """Return an MP3 whose first frame says that there are `count` more."""
    first = b"\xff\xfb\x90\xc0" + bytes(17) + b"Xing" + struct.pack(">II", 1, count)
    return first.ljust(417, b"\0") + mp3(frames)


def broken() -> list[bytes]:
    """Return 20 files that begin like sounds and are damaged, or say what is not so."""
    noise = random.Random(5)
    files = [wav(0.5)[:end] for end in (12, 20, 30, 40, 44, 60)]
    files += [flac()[:end] for end in (4, 10, 30, 42)]
    files += [mp3(frames)[:end] for frames, end in ((1, 3), (2, 600), (9, 900))]
    files += [flac()[:42] + noise.randbytes(900), flac(1 << 15)[:26] + bytes(900)]
    files += [b"\xff\xfb" + noise.randbytes(4000), b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(99)]
    files += [b"RIFF\xff\xff\xff\xffWAVE" + noise.randbytes(500), b"OggS" + bytes(500)]
    return [*files, wav(0.5, rate=100)]


def _crc8(data: bytes) -> int:
    return _crc(data, 8, 0x07)


def _crc16(data: bytes) -> int:
    return _crc(data, 16, 0x8005)


def _crc(data: bytes, width: int, polynomial: int) -> int:
    value = 0
    for byte in data:
        value ^= byte << width - 8
        for _ in range(8):
            value <<= 1
            if value >> width:
                value ^= 1 << width | polynomial
    return value


def audio_part(data: bytes, kind: str = "wav") -> dict[str, Any]:
    """Return a part of a message."""
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": kind}}


def spoken(*parts: bytes | str, role: str = "user") -> dict[str, Any]:
    """Return a message of texts and sounds."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else audio_part(part)
        for part in parts
    ]
    return {"role": role, "content": content}


def audio_projector(path: Path, *, width: int = 576, stack: int = 16) -> Path:
    """Write an mmproj of random weights for a model of that width, in the manner of Ultravox."""
    inner, hidden, mels, places = 32, 64, 80, 1500
    tensors: dict[str, tuple[int, ...]] = {
        "a.conv1d.1.weight": (3, mels, inner),
        "a.conv1d.1.bias": (1, inner),
        "a.conv1d.2.weight": (3, inner, inner),
        "a.conv1d.2.bias": (1, inner),
        "a.position_embd.weight": (inner, places),
        "a.post_ln.weight": (inner,),
        "a.post_ln.bias": (inner,),
        "mm.a.norm_pre.weight": (inner * stack,),
        "mm.a.mlp.1.weight": (inner * stack, 2 * hidden),
        "mm.a.norm_mid.weight": (hidden,),
        "mm.a.mlp.2.weight": (hidden, width),
    }
    shapes = dict.fromkeys(("ln1", "ln2"), (inner,))
    shapes |= dict.fromkeys(("attn_q", "attn_v", "attn_out"), (inner, inner))
    shapes |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for name, shape in shapes.items():
        tensors[f"a.blk.0.{name}.weight"] = shape
        tensors[f"a.blk.0.{name}.bias"] = shape[-1:]
    tensors["a.blk.0.attn_k.weight"] = (inner, inner)
    audio = "clip.audio."
    pairs: list[Pair] = [
        ("general.architecture", STRING, "clip"),
        ("general.type", STRING, "mmproj"),
        ("clip.projector_type", STRING, "ultravox"),
        ("clip.has_audio_encoder", BOOL, True),
        ("clip.has_vision_encoder", BOOL, False),
        (audio + "embedding_length", U32, inner),
        (audio + "feed_forward_length", U32, hidden),
        (audio + "projection_dim", U32, width),
        (audio + "block_count", U32, 1),
        (audio + "attention.head_count", U32, 4),
        (audio + "attention.layer_norm_epsilon", F32, 1e-5),
        (audio + "num_mel_bins", U32, mels),
        (audio + "projector.stack_factor", U32, stack),
    ]
    made = gguf(pairs, [(name, shape, 0) for name, shape in tensors.items()])
    size = sum(-(-4 * math.prod(shape) // 32) * 32 for shape in tensors.values())
    noise = random.Random(7)
    weights = struct.pack(f"<{size // 4}f", *(noise.gauss(0.0, 0.1) for _ in range(size // 4)))
    path.write_bytes(made[:-size] + weights)
    return path
