"""Sounds over HTTP: chats and /v1/responses; refused by name where an API has none."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.api.fakes import MODELS, FakeBackend, client
from tests.api.test_images import Host, http
from tests.pictures_made import data_url, image_part, png
from tests.sounds_made import audio_part, broken, wav

from headrace.api import images
from headrace.core.media import Audio, Image
from headrace.core.model import Capabilities
from headrace.core.request import GenerateRequest

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
PLACE = "messages[0].content[1]"
SOUND = wav(0.5)
SMALL: dict[str, Any] = {"max_body_bytes": 500, "max_image_body_bytes": 1 << 20}


async def sent(path: str, body: dict[str, Any], **settings: Any) -> Any:
    """Return the core request, or the status and the error."""
    backend = FakeBackend()
    able = Capabilities(audio=True)
    backend.served = [replace(model, capabilities=able, state="ready") for model in MODELS]
    async with client(backend, **settings) as http:
        answer = await http.post(path, json={"model": "m", **body})
    if answer.status_code != 200:
        assert backend.requests == []
        return answer.status_code, answer.json()["error"]
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest)
    return request


def chat(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    content = [{"type": "text", "text": "a"}, *parts]
    return {"messages": [{"role": role, "content": content}]}


def linked(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


async def test_a_sound_travels_once() -> None:
    """Issue 13, audio input: in both forms, beside an image; the bytes by digest."""
    parts = (audio_part(SOUND, "mp3"), linked(data_url(SOUND, "audio/wav")), image_part(png()))
    request = await sent(CHAT, chat(*parts))
    _, first, second, picture = request.messages[0].content
    assert isinstance(first, Audio)
    assert isinstance(picture, Image)
    assert (first.format, first.seconds, first.size) == ("wav", 0.5, len(SOUND))
    assert first.digest == second.digest
    assert request.media == {first.digest: SOUND, picture.digest: png()}
    assert str(SOUND[50:90]) not in str(request.content()) + str(request.settings())


async def test_responses_take_sounds() -> None:
    part = {**audio_part(SOUND), "type": "input_audio"}
    request = await sent(RESPONSES, {"input": [{"role": "user", "content": [part]}]})
    (audio,) = request.messages[0].content
    assert audio.seconds == 0.5
    status, error = await sent(
        RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}
    )
    assert (status, error["param"]) == (400, "input[0].content[0]")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (audio_part(b"text"), "not audio in WAV, MP3 or FLAC"),
        (audio_part(png()), "not audio"),
        (linked("http://example.org/a.wav"), "sounds of this host are not fetched"),
        (linked("file:///etc/passwd"), "send the audio in a data: URL"),
        (linked("data:audio/wav;base64,?"), "not base64"),
        ({"type": "input_audio"}, "input_audio is missing"),
        ({"type": "audio_url"}, "audio_url is missing"),
        ({"type": "image_url", "image_url": data_url(SOUND)}, "not an image"),
        (linked(data_url(wav(0.05))), "shorter than 0.1 s"),
    ],
)
async def test_what_is_refused(part: dict[str, Any], message: str) -> None:
    status, error = await sent(CHAT, chat(part))
    assert (status, error["param"]) == (400, PLACE)
    assert message in error["message"]


async def test_broken_files_are_errors_by_their_place() -> None:
    """Issue 13.5, for sounds: what the header shows is refused before anything is decoded."""
    answers = [await sent(CHAT, chat(audio_part(data))) for data in broken()]
    refused = [answer for answer in answers if isinstance(answer, tuple)]
    assert len(refused) >= 15
    assert {(status, error["param"]) for status, error in refused} == {(400, PLACE)}


async def test_too_many_and_other_roles() -> None:
    status, error = await sent(CHAT, chat(*[audio_part(SOUND)] * 17))
    assert (status, error["param"]) == (400, "messages[0].content[17]")
    status, error = await sent(CHAT, chat(audio_part(SOUND), role="system"))
    assert (status, error["param"]) == (400, PLACE)
    status, error = await sent(CHAT, chat(audio_part(SOUND)) | {"user": "a" * 900}, **SMALL)
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_sound_of_an_allowed_host_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    host = Host(http(SOUND))
    async with host.running() as port:
        part = linked(f"http://localhost:{port}/a.wav")
        request = await sent(CHAT, chat(part), media_hosts=("localhost",))
    assert request.messages[0].content[1].seconds == 0.5


async def test_other_apis_refuse_sounds_by_name() -> None:
    """Neither Anthropic's API nor Ollama's has them."""
    block = {"type": "input_audio", "input_audio": {"data": "YQ==", "format": "wav"}}
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post("/v1/messages", json={"model": "m", **body})
        assert answer.status_code == 400
        assert "input_audio" in answer.text
        picture = data_url(SOUND).partition(",")[2]
        turn = {"role": "user", "content": "a", "images": [picture]}
        answer = await http.post("/api/chat", json={"model": "m", "messages": [turn]})
        assert answer.status_code == 400
        assert "not an image" in answer.text
    assert backend.requests == []
