"""Audio: heard and counted, or refused by the place of the first sound."""

from __future__ import annotations

import io
import math
import struct
import wave

from headrace.core.media import Pictures
from headrace.core.request import GenerateRequest
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.media import media_request, prompt_tokens, require
from headrace.lab.cases.subject import TOKENS, Reply, Subject, check, read

_RATE, _SECONDS = 16000, 1
_TONES = (220, 440, 1760, 3520)


def _wav(tone: int) -> bytes:
    """Return a WAV of one tone, in Hz."""
    samples = (math.sin(2 * math.pi * tone * at / _RATE) for at in range(_RATE * _SECONDS))
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(_RATE)
        made.writeframes(b"".join(struct.pack("<h", int(20000 * sample)) for sample in samples))
    return file.getvalue()


def _request(subject: Subject, *parts: bytes | str) -> GenerateRequest:
    longer = {"max_tokens": 4 * TOKENS}
    return media_request(subject, Pictures.add_audio, *parts, sampling=longer)


async def _answer(subject: Subject, *parts: bytes | str) -> Reply:
    return await read(subject.backend.ask(_request(subject, *parts)))


async def _require_audio(subject: Subject) -> None:
    request = _request(subject, "What is ", _wav(_TONES[0]), "it?")
    await require(subject, request, "audio", able=subject.capabilities.audio)


@case("W31 W2")
async def audio(subject: Subject) -> None:
    """A sound is part of the prompt: it is counted, and the answer depends on it alone."""
    await _require_audio(subject)
    text = await _answer(subject, "What is it?")
    replies = [await _answer(subject, _wav(tone), "What is it?") for tone in _TONES]
    for reply in replies:
        sound(subject, reply, held=3)
    again = await _answer(subject, _wav(_TONES[0]), "What is it?")
    check(again.text == replies[0].text, "The same sound is answered in two ways.")
    shown = {reply.text for reply in replies}
    check(len(shown) > 1, f"{len(_TONES)} sounds are all answered by {again.text!r}.")
    if subject.is_remote:
        return
    counts = {prompt_tokens(reply) for reply in (*replies, again)}
    check(len(counts) == 1, f"Sounds of one length have {sorted(counts)} tokens.")
    each = prompt_tokens(again) - prompt_tokens(text)
    check(
        each > 0,
        f"The prompt has {prompt_tokens(text)} tokens, and {prompt_tokens(again)} with a sound.",
    )


CASES = (audio,)
