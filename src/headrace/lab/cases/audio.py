"""Audio: heard and counted, or refused by the place of the first sound."""

from __future__ import annotations

import io
import math
import struct
import wave

from headrace.core.errors import RequestError, Unsupported
from headrace.core.media import Pictures
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import TOKENS, Declared, Reply, Subject, check, read, refusal

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
    """Return a greedy request with a message of texts and sounds."""
    pictures = Pictures()
    content = tuple(
        part if isinstance(part, str) else pictures.add_audio(part, f"messages[0].content[{place}]")
        for place, part in enumerate(parts)
    )
    given = subject.able(max_tokens=4 * TOKENS, temperature=0.0)
    return GenerateRequest(
        messages=(Message("user", content),), media=pictures.data, sampling=Sampling(**given)
    )


async def _answer(subject: Subject, *parts: bytes | str) -> Reply:
    return await read(subject.backend.ask(_request(subject, *parts)))


async def _require_audio(subject: Subject) -> None:
    """Check that sounds are refused by their place where the model takes none.

    Raises:
        Declared: they are.
    """
    request = _request(subject, "What is ", _wav(_TONES[0]), "it?")
    if not subject.capabilities.audio:
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "messages[0].content[1]", f"The error names {error.param}.")
        raise Declared("It takes no audio, and names the first sound.")
    if subject.is_remote:
        try:
            await read(subject.backend.ask(request))
        except RequestError as error:
            raise Declared(f"The upstream refuses it: {error.message}") from error


def _prompt(reply: Reply) -> int:
    return reply.finish.usage.prompt_tokens


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
    counts = {_prompt(reply) for reply in (*replies, again)}
    check(len(counts) == 1, f"Sounds of one length have {sorted(counts)} tokens.")
    each = _prompt(again) - _prompt(text)
    check(each > 0, f"The prompt has {_prompt(text)} tokens, and {_prompt(again)} with a sound.")


CASES = (audio,)
