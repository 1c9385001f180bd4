"""Images over HTTP: data: URLs, hosts that are allowed, and bounds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from tests.api.fakes import MODELS, FakeBackend, client
from tests.pictures_made import data_url, image_part, png, png_of, question

from headrace.api import images
from headrace.api.images import Held, is_public
from headrace.api.problems import Refused
from headrace.core.errors import InvalidRequest
from headrace.core.model import Capabilities
from headrace.core.request import GenerateRequest

CHAT = "/v1/chat/completions"
PLACE = "messages[0].content[1]"


def seeing() -> FakeBackend:
    backend = FakeBackend()
    backend.served = [replace(model, capabilities=Capabilities(vision=True)) for model in MODELS]
    return backend


async def sent(*messages: dict[str, Any], **settings: Any) -> Any:
    """Return the core request, or the error."""
    backend = seeing()
    async with client(backend, **settings) as http:
        answer = await http.post(CHAT, json={"model": "m", "messages": list(messages)})
    if answer.status_code != 200:
        assert backend.requests == []
        return answer.status_code, answer.json()["error"]
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest)
    return request


async def test_an_image_travels_once() -> None:
    """Issue 13, pictures: bytes by digest, and a message that can be logged."""
    picture = png()
    request = await sent(question("a", picture, "b", picture), question("c", png(9, 8), "d"))
    first, second = request.messages
    assert [*map(type, first.content)] == [str, type(first.content[1]), str, type(first.content[3])]
    assert first.content[1] == first.content[3]
    assert request.media[first.content[1].digest] == picture
    assert len(request.media) == 2
    assert (second.content[1].width, second.content[1].height) == (9, 8)
    shown = str(request.content()) + str(request.settings()) + request.opening()
    assert base64.b64encode(picture).decode()[:40] not in shown
    assert repr(picture)[2:40] not in shown
    assert request.cost() > 256 + 3 * 64


async def test_texts_alone_are_one_text() -> None:
    assert (await sent(question("a", "b"))).messages[0].content == "ab"


@pytest.mark.parametrize("url", [
    data_url(png(), "image/jpeg"), data_url(png(), ""), data_url(png()).replace("data:", "DATA:"),
    data_url(png())[:60] + "\n" + data_url(png())[60:],
])  # fmt: skip
async def test_the_bytes_say_what_it_is(url: str) -> None:
    part = {"type": "image_url", "image_url": url}
    request = await sent({"role": "user", "content": [part]})
    assert request.messages[0].content[0].format == "png"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "send the image in a data: URL"),
        ("file:///etc/passwd", "send the image in a data: URL"),
        ("/etc/passwd", "send the image in a data: URL"),
        ("ftp://example.org/a.png", "send the image in a data: URL"),
        ("http://example.org/a.png", "images of this host are not fetched"),
        ("HTTPS://example.org/a.png", "images of this host are not fetched"),
        ("http://127.0.0.1/a.png", "images of this host are not fetched"),
        ("data:image/png,abc", "has ;base64,"),
        ("data:image/png;base64", "has ;base64,"),
        ("data:image/png;base64,a*b=", "not base64"),
        ("data:image/png;base64,YQ", "not base64"),
        ("data:image/png;base64,", "not an image in"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image in"),
        (data_url(b"\x89PNG\r\n\x1a\n"), "ends within its header"),
        (data_url(png_of(60_000, 60_000, b"")), "60000 x 60000 are more than"),
        (data_url(png() + bytes(21 << 20)), "all images and sounds have more than 20971520 bytes"),
    ],
)
async def test_what_is_refused(url: str, message: str) -> None:
    """Issue 13, pictures: a 400 that names the place."""
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
    status, error = await sent({"role": "user", "content": content})
    assert (status, error["param"]) == (400, PLACE)
    assert message in error["message"]
    assert PLACE in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("part", [
    {"type": "input_audio"},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ=="}},
    {"type": "file", "file": {"file_id": "a"}},
    {"type": "image_url"},
])  # fmt: skip
async def test_other_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    status, error = await sent({"role": "user", "content": [{"type": "text", "text": "a"}, part]})
    assert status == 400
    assert error["param"].startswith(PLACE)
    assert part["type"] in error["message"]


async def test_too_many_images_and_other_roles() -> None:
    status, error = await sent(question(*[png()] * 17))
    assert (status, error["param"]) == (400, "messages[0].content[16]")
    status, error = await sent(question("a", png(), role="system"), question("b"))
    assert (status, error["param"]) == (400, PLACE)


async def test_the_size_of_a_body() -> None:
    """Larger for images alone, and only where a model may take them."""
    large = question("a", png() + bytes(200_000))
    limits: Any = {"max_body_bytes": 100_000}
    assert isinstance(await sent(large, **limits), GenerateRequest)
    assert (await sent(large, max_image_body_bytes=200_000, **limits))[0] == 413
    assert (await sent(question("a" * 100_000, png()), **limits))[0] == 413
    assert (await sent(question("a" * 100_000), **limits))[0] == 413
    backend = FakeBackend()
    async with client(backend, **limits) as http:
        assert (await http.post(CHAT, json={"messages": [large]})).status_code == 413


async def test_images_of_all_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_HELD", 100)
    held = Held()
    with held.hold(60):
        with pytest.raises(Refused) as refused, held.hold(41):
            pass
        assert (refused.value.problem.status, refused.value.problem.code) == (
            503,
            "too_many_images",
        )
        with held.hold(40):
            assert held.size == 100
    assert held.size == 0
    assert (await sent(question("a", png())))[0] == 503
    assert images.HELD.size == 0


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "198.18.0.1", "192.0.2.1", "240.0.0.1",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1",
    "2001:db8::1", "2001:0:1::1", "::127.0.0.1", "64:ff9b:1::1", "localhost", "",
])  # fmt: skip
def test_inside_addresses_are_not_public(address: str) -> None:
    """Issue 13, pictures: no way to inside addresses."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


class Host:
    """A server that gives every request the same answer, and keeps the requests."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answer)
            await writer.drain()
            if self.answer:
                writer.close()
            else:
                await reader.read()
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers))
    return f"{head}\r\n\r\n".encode() + body


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine counts as public."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")


async def fetched(answer: bytes, hosts: Sequence[str] = ("localhost",), path: str = "/a?b") -> Any:
    host = Host(answer)
    async with host.running() as port:
        url = f"http://localhost:{port}{path}"
        return (await images.fetch({url: PLACE}, hosts)).get(url), host


@pytest.mark.usefixtures("inside")
async def test_an_image_of_an_allowed_host() -> None:
    data, host = await fetched(http(png()))
    assert data == png()
    assert host.requests[0].startswith(b"GET /a?b HTTP/1.1\r\n")
    assert b"host: localhost:" in host.requests[0].lower()
    assert b"accept-encoding: identity" in host.requests[0].lower()
    assert (await fetched(http(png()), ("*.localhost",)))[0] is None
    assert (await fetched(http(png()), ("*",)))[0] == png()


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http(b"", "302 Found", "location: http://127.0.0.1/"), "answered 302"),
        (http(b"", "404 Not Found"), "answered 404"),
        (http(png(), "200 OK", "content-encoding: gzip"), "compressed"),
        (b"nonsense\r\n\r\n", "not fetched"),
        (http(bytes(21 << 20)), "more than 20971520 bytes"),
    ],
)
async def test_what_is_not_fetched(answer: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await fetched(answer)
    assert caught.value.param == PLACE


@pytest.mark.usefixtures("inside")
async def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_TIMEOUT_S", 0.2)
    with pytest.raises(InvalidRequest, match=r"more than 0\.2 s"):
        await fetched(b"")


async def test_the_address_is_checked() -> None:
    """The names of this machine, in all forms, with every host allowed."""
    host = Host(http(png()))
    async with host.running() as port:
        for name in ("localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "0"):
            with pytest.raises(InvalidRequest, match=r"not public|no address"):
                await images.fetch({f"http://{name}:{port}/": PLACE}, ("*",))
    with pytest.raises(InvalidRequest, match="with a user"):
        await images.fetch({f"http://example.org@127.0.0.1:{port}/": PLACE}, ("*",))
    with pytest.raises(InvalidRequest):
        await images.fetch({"http://example.org:99999/": PLACE}, ("*",))
    assert host.requests == []


@pytest.mark.usefixtures("inside")
async def test_an_image_of_a_host_over_http() -> None:
    """From the request to the backend."""
    host = Host(http(png()))
    async with host.running() as port:
        url = f"http://localhost:{port}/a.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        message = {"role": "user", "content": [part, part, image_part(png(9, 8))]}
        request = await sent(message, media_hosts=("localhost",))
    assert len(host.requests) == 1
    assert [image.width for image in request.messages[0].content] == [64, 64, 9]
    assert png() in request.media.values()
