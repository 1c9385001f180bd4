"""Images in /v1/responses, /v1/messages and their counts: the same bounds as in chats."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.api.fakes import client
from tests.api.test_images import Host, http, seeing
from tests.pictures_made import data_url, png

from headrace.api import images
from headrace.core.request import CountRequest, GenerateRequest

Made = Callable[[Any, str], dict[str, Any]]
PICTURE, SMALL = png(), png(9, 8)


def responses(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "m", "input": [{"role": role, "content": content}]}


def output(content: Any, _role: str = "user") -> dict[str, Any]:
    call: Any = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    returned = {"type": "function_call_output", "call_id": "c", "output": content}
    return {"model": "m", "input": [call, returned]}


def messages(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": [{"role": role, "content": content}]}


def result(content: Any, _role: str = "user") -> dict[str, Any]:
    call: Any = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    returned = {"type": "tool_result", "tool_use_id": "c", "content": content}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [returned]}]
    return {"model": "m", "max_tokens": 9, "messages": turns}


def item(picture: bytes | str) -> dict[str, Any]:
    """Return an image as a part of /v1/responses."""
    url = picture if isinstance(picture, str) else data_url(picture)
    return {"type": "input_image", "image_url": url, "detail": "auto"}


def block(picture: bytes | str) -> dict[str, Any]:
    """Return an image as a block of /v1/messages."""
    source: dict[str, Any] = {"type": "url", "url": picture}
    if isinstance(picture, bytes):
        data = base64.b64encode(picture).decode()
        source = {"type": "base64", "media_type": "image/png", "data": data}
    return {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}


def parts(path: str, *given: bytes | str) -> list[dict[str, Any]]:
    """Return texts, and images, which are bytes or URLs, as an API has them."""
    is_url = [isinstance(part, str) and "://" in part for part in given]
    kind, image = ("input_text", item) if "responses" in path else ("text", block)
    return [
        {"type": kind, "text": part} if isinstance(part, str) and not url else image(part)
        for part, url in zip(given, is_url, strict=True)
    ]


RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SHAPES = [
    pytest.param(RESPONSES, responses, "input[0].content", id="responses"),
    pytest.param(RESPONSES, output, "input[1].output", id="function_call_output"),
    pytest.param(MESSAGES, messages, "messages[0].content", id="messages"),
    pytest.param(MESSAGES, result, "messages[1].content[0].content", id="tool_result"),
]
COUNTS = {RESPONSES: f"{RESPONSES}/input_tokens", MESSAGES: f"{MESSAGES}/count_tokens"}
shapes = pytest.mark.parametrize(("path", "made", "place"), SHAPES)


async def sent(path: str, body: dict[str, Any], **settings: Any) -> Any:
    """Return the core request, or the status and the text of the error."""
    backend = seeing()
    async with client(backend, **settings) as server:
        answer = await server.post(path, json=body)
    if answer.status_code != 200:
        assert backend.requests == []
        return answer.status_code, answer.json()["error"]["message"]
    return backend.requests[0]


def last(request: GenerateRequest | CountRequest) -> Any:
    """Return the content of the last turn."""
    assert request.messages is not None
    return request.messages[-1].content


@shapes
async def test_images_reach_the_core(path: str, made: Made, place: str) -> None:
    """Issue 14.1, 14.2: texts and images in their order, and their bytes once."""
    body = made(parts(path, "a", PICTURE, "b", SMALL, PICTURE), "user")
    request = await sent(path, body)
    first, image, second, small, again = last(request)
    assert (first, second, small.width) == ("a", "b", 9)
    assert image == again
    assert request.media == {image.digest: PICTURE, small.digest: SMALL}
    assert (image.place, small.place) == (f"{place}[1]", f"{place}[3]")
    body.pop("max_tokens", None)
    counted = await sent(COUNTS[path], body)
    assert isinstance(counted, CountRequest)
    assert last(counted) == last(request)
    assert images.HELD.size == 0


async def test_an_error_of_a_tool_has_its_image() -> None:
    body = result(parts(MESSAGES, PICTURE))
    body["messages"][1]["content"][0]["is_error"] = True
    request = await sent(MESSAGES, body)
    assert last(request)[0] == "Error: "
    assert len(request.media) == 1


async def test_the_place_of_an_image_is_that_in_the_request() -> None:
    """Also where turns of the core are others: instructions come first, results before texts."""
    body = responses(parts(RESPONSES, PICTURE)) | {"instructions": "Be brief."}
    request = await sent(RESPONSES, body)
    assert last(request)[0].place == "input[0].content[0]"
    body = messages(parts(MESSAGES, "x", PICTURE)) | {"system": "Be brief."}
    request = await sent(MESSAGES, body)
    assert last(request)[1].place == "messages[0].content[1]"


@shapes
@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"\x89PNG\r\n\x1a\n", "ends within its header"),
        (b"<svg/>", "not an image in"),
        (PICTURE + bytes(21 << 20), "all images and sounds have more than 20971520 bytes"),
        ("file:///etc/passwd", "send the image in a data: URL"),
        ("http://127.0.0.1/a.png", "images of this host are not fetched"),
    ],
)
async def test_what_is_refused(
    path: str, made: Made, place: str, picture: bytes | str, message: str
) -> None:
    """Issue 14.1, 14.2: a 400 with the place, and no traces of it."""
    status, text = await sent(path, made(parts(path, "a", picture), "user"))
    assert status == 400
    assert message in text
    assert f"{place}[1]" in text
    assert len(text) < 300
    assert images.HELD.size == 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (RESPONSES, responses([item(PICTURE)], "system"), "not of system"),
        (RESPONSES, responses([item(PICTURE)], "assistant"), "not of assistant"),
        (RESPONSES, responses([{"type": "input_image"}]), "image_url is missing"),
        (RESPONSES, responses([{"type": "input_image", "file_id": "f"}]), "keeps no files"),
        (RESPONSES, responses([{"type": "input_file", "file_id": "f"}]), "'input_file'"),
        (MESSAGES, messages([block(PICTURE)], "system"), "not of system"),
        (MESSAGES, messages([block(PICTURE)], "assistant"), "'image' is not supported"),
        (MESSAGES, messages("x") | {"system": [block(PICTURE)]}, "not of system"),
        (MESSAGES, messages([{"type": "image"}]), "source is base64 with its data"),
        (MESSAGES, messages([{"type": "image", "source": {"type": "file", "file_id": "f"}}]),
         "keeps no files"),
        (MESSAGES, messages([{"type": "image", "source": {"type": "base64", "data": "x!"}}]),
         "not base64"),
        (RESPONSES, responses([item(SMALL)] * 17), "At most 16 images"),
        (MESSAGES, messages([block(SMALL)] * 17), "At most 16 images"),
    ],
)  # fmt: skip
async def test_images_in_other_places(path: str, body: dict[str, Any], message: str) -> None:
    status, text = await sent(path, body)
    assert (status, message in text) == (400, True), text


@shapes
async def test_the_size_of_a_body(path: str, made: Made, place: str) -> None:
    """Larger for images alone; counts too."""
    del place
    large = made(parts(path, "a", PICTURE + bytes(200_000)), "user")
    limits: Any = {"max_body_bytes": 100_000}
    assert isinstance(await sent(path, large, **limits), GenerateRequest)
    large.pop("max_tokens", None)
    assert isinstance(await sent(COUNTS[path], large, **limits), CountRequest)
    both = made(parts(path, "a" * 100_000, PICTURE), "user")
    assert (await sent(path, both, **limits))[0] == 413
    assert (await sent(path, large, max_image_body_bytes=200_000, **limits))[0] == 413


@shapes
async def test_images_of_all_requests_are_bounded(
    path: str, made: Made, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del place
    monkeypatch.setattr(images, "MAX_HELD", 100)
    assert (await sent(path, made(parts(path, PICTURE), "user")))[0] == 503
    assert images.HELD.size == 0


@shapes
async def test_an_image_of_an_allowed_host(
    path: str, made: Made, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14.1, 14.2: fetched once, for answers and for counts."""
    del place
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    host = Host(http(PICTURE))
    async with host.running() as port:
        url = f"http://localhost:{port}/a.png"
        body = made(parts(path, url, "which?", url), "user")
        request = await sent(path, body, media_hosts=("localhost",))
        body.pop("max_tokens", None)
        counted = await sent(COUNTS[path], body, media_hosts=("localhost",))
    assert len(host.requests) == 2
    assert [*request.media.values()] == [PICTURE]
    assert last(counted) == last(request)


async def test_the_tokens_of_a_chat_with_an_image() -> None:
    """`/tokenize` takes what a chat takes, and more bytes for images."""
    part = {"type": "image_url", "image_url": {"url": data_url(PICTURE + bytes(200_000))}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    counted = await sent("/tokenize", body, max_body_bytes=100_000)
    assert last(counted)[0].width == 64


def contents(request: GenerateRequest) -> Sequence[Any]:
    return [message.content for message in request.messages or ()]


async def test_several_system_messages_are_joined() -> None:
    items: list[Any] = [{"role": "system", "content": "b"}, {"role": "user", "content": "x"}]
    body = {"model": "m", "instructions": "a", "input": items}
    assert contents(await sent(RESPONSES, body)) == ["a\n\nb", "x"]
