"""Bytes on a real socket, and what becomes of them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from tests.api.fakes import CHAT, FakeBackend, chat, hello
from tests.api.sockets import Raw, request, serving, wait_until

from headrace.api import limits
from headrace.api.connection import Connection
from headrace.api.exchange import Exchange
from headrace.api.limits import ApiSettings
from headrace.api.problems import Refused
from headrace.api.transaction import Transaction
from headrace.core.events import Delta
from headrace.core.request import AnyRequest

BODY = json.dumps(chat()).encode()
STREAM = json.dumps(chat(stream=True)).encode()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(FakeBackend(), ApiSettings()) as port:
        yield port


@pytest.fixture
def raw(port: int) -> Iterator[Raw]:
    with Raw(port) as raw:
        yield raw


def chunked(body: bytes, size: int = 7, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    whole = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return whole + b"0\r\n" + trailers + b"\r\n"


UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    "websocket": ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA=="),
    "tls": ("Connection: keep-alive, Upgrade", "Upgrade: TLS/1.0, HTTP/2.0"),
    "unknown": ("Upgrade: anything/9", "Connection: Upgrade"),
    "not in connection": ("Upgrade: h2c",),
    "no protocol": ("Connection: Upgrade",),
}


@pytest.mark.parametrize("lines", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("cut", ["whole", "head", "bytes"])
def test_upgrade_is_ignored(raw: Raw, lines: tuple[str, ...], framing: str, cut: str) -> None:
    """Issue 12.1: with a body in one packet or several, chunked or not, again and again."""
    if framing == "chunked":
        whole = request(CHAT, chunked(BODY), *lines, "Transfer-Encoding: chunked")
    else:
        whole = request(CHAT, BODY, *lines)
    end = whole.index(b"\r\n\r\n") + 4
    packets = {
        "whole": [whole],
        "head": [whole[:end], whole[end:]],
        "bytes": [whole[i : i + 1] for i in range(len(whole))],
    }
    for _ in range(3):
        answer = raw.send(*packets[cut]).read()
        assert answer.status == 200, answer.body
        assert "connection" not in answer.headers
        assert b'"object":"chat.completion"' in answer.body
    assert raw.send(request("/v1/models", method="GET")).read().status == 200


def test_upgrade_among_pipelined_requests(raw: Raw) -> None:
    """Issue 12.1: what follows the body of such a request is the next one."""
    one = request(CHAT, BODY, *UPGRADES["h2c"])
    two = request(CHAT, chunked(BODY), *UPGRADES["websocket"], "Transfer-Encoding: chunked")
    raw.send((one + two + request("/v1/models", b"", *UPGRADES["h2c"], method="GET")) * 5)
    for _ in range(5):
        objects = [json.loads(raw.read().body)["object"] for _ in range(3)]
        assert objects == ["chat.completion", "chat.completion", "list"]


def test_http_1_0_has_no_chunks(port: int) -> None:
    """Issue 12.2: the end of a stream is the end of the connection."""
    for lines in ((), ("Connection: keep-alive",)):
        with Raw(port) as raw:
            whole = request(CHAT, STREAM, *lines).replace(b"HTTP/1.1", b"HTTP/1.0")
            answer = raw.send(whole).read()
            assert answer.status == 200
            assert "transfer-encoding" not in answer.headers
            assert answer.headers["connection"] == "close"
            assert answer.body.startswith(b"data: ")
            assert answer.body.endswith(b"data: [DONE]\n\n")


def test_http_1_0_stays_open_if_wanted(port: int) -> None:
    """Issue 12.2: only what asks for it, and only when the length is known."""
    old = request(CHAT, BODY, "Connection: Keep-Alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    with Raw(port) as raw:
        for _ in range(3):
            answer = raw.send(old).read()
            assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
    with Raw(port) as raw:
        answer = raw.send(old.replace(b"Connection: Keep-Alive\r\n", b"")).read()
        assert answer.headers["connection"] == "close"
        assert raw.is_closed()


def test_100_continue(raw: Raw) -> None:
    """Issue 11.3: the body is called for when it is read, and not when it has come already."""
    head, _, body = request(CHAT, BODY, "Expect: 100-continue").partition(b"\r\n\r\n")
    for _ in range(2):
        assert raw.send(head + b"\r\n\r\n").read().status == 100
        assert raw.send(body).read().status == 200
        assert raw.send(head + b"\r\n\r\n" + body).read().status == 200


def test_a_refusal_calls_for_no_body(port: int) -> None:
    """Issue 11.3: the answer comes instead of 100, and then the connection ends."""
    whole = request("/nope", BODY, "Expect: 100-continue")
    with Raw(port) as raw:
        answer = raw.send(whole.partition(b"{")[0]).read()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert raw.is_closed()
    with Raw(port) as raw:
        assert raw.send(request(CHAT, BODY, "Expect: something")).read().status == 417
        assert raw.is_closed()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/v1/models", 200), ("HEAD", "/nope", 404), ("GET", "/v1/models", 200),
     ("GET", "http://localhost/v1/models?x#y", 200), ("GET", "/v1/mod%65ls#y", 200),
     ("OPTIONS", "*", 404), ("OPTIONS", CHAT, 405), ("DELETE", CHAT, 405), ("GET", CHAT, 405)],
)  # fmt: skip
def test_methods(raw: Raw, method: str, path: str, status: int) -> None:
    """Issue 11.3: each answer is as long as it says, so the next one is understood."""
    for _ in range(2):
        answer = raw.send(request(path, method=method)).read(method)
        assert answer.status == status
        assert (answer.body == b"") == (method == "HEAD")
        assert int(answer.headers["content-length"]) > 0


def test_no_content(raw: Raw) -> None:
    lines = ("Origin: http://localhost", "Access-Control-Request-Method: POST")
    for _ in range(2):
        answer = raw.send(request(CHAT, b"", *lines, method="OPTIONS")).read()
        assert answer.status == 204
        assert not {"content-length", "transfer-encoding"} & set(answer.headers)


MALFORMED = {
    "both": "Content-Length: 3\r\nTransfer-Encoding: chunked",
    "both, turned": "Transfer-Encoding: chunked\r\nContent-Length: 3",
    "two lengths": "Content-Length: 3\r\nContent-Length: 4",
    "list of lengths": "Content-Length: 3, 4",
    "signed": "Content-Length: +3",
    "negative": "Content-Length: -3",
    "hexadecimal": "Content-Length: 0x3",
    "no length": "Content-Length:",
    "huge": "Content-Length: 99999999999999999999999",
    "folded": "X: a\r\n b",
    "space before the colon": "Content-Length : 3",
    "space in the name": "X Y: z",
    "no name": ": x",
    "bare LF": "X: a\nY: b",
    "bare CR": "X: a\rY: b",
    "NUL": "X: a\0b",
    "not chunked last": "Transfer-Encoding: chunked, gzip",
    "chunked twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "identity": "Transfer-Encoding: identity",
    "no coding": "Transfer-Encoding:",
    "no coding, and a length": "Transfer-Encoding:\r\nContent-Length: 3",
    "xchunked": "Transfer-Encoding: xchunked",
    "tab chunked": "Transfer-Encoding: \x0bchunked",
}


@pytest.mark.parametrize("upgrade", [False, True])
@pytest.mark.parametrize("lines", MALFORMED.values(), ids=MALFORMED)
def test_what_could_be_read_in_two_ways(port: int, lines: str, upgrade: bool) -> None:
    """Issue 11.3: refused and closed, also under an Upgrade; nothing behind it is a request."""
    more = "\r\n".join(UPGRADES["h2c"]) + "\r\n" if upgrade else ""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{more}{lines}\r\n\r\n".encode("latin-1")
    with Raw(port) as raw:
        answer = raw.send(head + b"abc" + request("/v1/models", method="GET")).read()
        assert answer.status == 400, answer
        assert json.loads(answer.body)["error"]["message"]
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-request-id"]
        assert raw.is_closed()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /v1/models HTTP/2.0\r\n\r\n", 505), ("GET /v1/models\r\n\r\n", 505),
        ("GET /v1/models HTTP/0.9\r\n\r\n", 505), ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01", 400), ("GET /v1/models HTTP/1.1\n\n", 400),
        ("NONSENSE / HTTP/1.1\r\n\r\n", 400), ("CONNECT a:80 HTTP/1.1\r\n\r\n", 400),
        ("GET v1 HTTP/1.1\r\n\r\n", 400), ("GET /\xff HTTP/1.1\r\n\r\n", 400),
        ("GET ftp://localhost/ HTTP/1.1\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_request(port: int, head: str, status: int) -> None:
    """Issue 11.3: answered at once, not at the deadline."""
    with Raw(port) as raw:
        assert raw.send(head.encode("latin-1")).read().status == status
        assert raw.is_closed()


@pytest.mark.parametrize(
    "body",
    [b"5\nhello", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"-1\r\n", b"0x5\r\nhello\r\n",
     b"fffffffffffffffff\r\n", b"5 \r\nhello\r\n", b"5;a\nb\r\nhello", b"0\r\n\n", b"g\r\n",
     b"0\r\nContent-Length: 3\r\n\r\n", b"\r\n5\r\nhello"],
)  # fmt: skip
def test_malformed_chunks(port: int, body: bytes) -> None:
    """Issue 11.3: the app reads an error instead of a body."""
    with Raw(port) as raw:
        answer = raw.send(request(CHAT, body, "Transfer-Encoding: chunked")).read()
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert b"malformed_http" in answer.body
        assert raw.is_closed()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4096])
def test_chunks(raw: Raw, size: int) -> None:
    """Issue 11.1: small chunks, extensions and trailers are read, and end where they end."""
    body = BODY[:-1] + b"\r\n\r\n \r\n\r\n}"
    whole = chunked(body, size, b";a=b", b"X-Sum: 1\r\nY: 2\r\n")
    whole = request(CHAT, whole, "Transfer-Encoding: chunked") + request("/health", method="GET")
    raw.send(whole)
    assert [raw.read().status, raw.read().status] == [200, 200]
    raw.send(*(whole[i : i + 11] for i in range(0, len(whole), 11)))
    assert [raw.read().status, raw.read().status] == [200, 200]


def test_empty_lines_between_requests(raw: Raw) -> None:
    """RFC 9112, 2.2: a client may send one behind a body."""
    for _ in range(3):
        assert raw.send(b"\r\n", request(CHAT, BODY), b"\r\n\r\n").read().status == 200


def test_limits_of_the_head(port: int) -> None:
    """Issue 11.1: what fits is served, one byte more is refused."""
    url = limits.MAX_URL - len("/health?")
    value = limits.MAX_HEADER - len("hostlocalhostcontent-length0x") - 12
    count = limits.MAX_HEADERS - 2
    for extra, statuses in ((0, (200, 200, 200)), (1, (414, 431, 431))):
        heads = (
            request("/health?" + "a" * (url + extra), method="GET"),
            request("/health", b"", "x: " + "a" * (value + extra), method="GET"),
            request("/health", b"", *["x: y"] * (count + extra), method="GET"),
        )
        for head, status in zip(heads, statuses, strict=True):
            with Raw(port) as raw:
                assert raw.send(head).read().status == status


def test_an_answer_before_the_body(raw: Raw) -> None:
    """Issue 11.1: what is left of a body is dropped, and the connection goes on."""
    body = b"x" * 100_000
    head, _, _ = request("/nope", body).partition(b"xxx")
    for _ in range(2):
        assert raw.send(head).read().status == 404
        assert raw.send(body, request("/health", method="GET")).read().status == 200


def test_an_answer_before_an_endless_body(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.1: not more is dropped than the limit; the client can still read the answer."""
    monkeypatch.setattr(limits, "MAX_DISCARDED", 1 << 20)
    with Raw(port) as raw:
        raw.send(request("/nope", b"", "Content-Length: 1000000000"))
        assert raw.read().status == 404
        with pytest.raises(OSError):  # noqa: PT011 - EPIPE or ECONNRESET
            for _ in range(1000):
                raw.send(b"x" * 100_000)


def test_a_large_body_gets_its_413(port: int) -> None:
    """Issue 11.1: also for a client that sends all of it before it reads."""
    for lines, body in ((), b"x" * (9 << 20)), (("Transfer-Encoding: chunked",), None):
        whole = chunked(b"x" * (9 << 20), 65536) if body is None else body
        with Raw(port) as raw:
            answer = raw.send(request(CHAT, whole, *lines)).read()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert raw.is_closed()


def test_deadlines_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.2: nothing, half a head, a byte at a time, half of a second head."""
    monkeypatch.setattr(limits, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr("headrace.api.server._SWEEP_S", 0.05)
    stop = threading.Event()
    with serving(FakeBackend(), ApiSettings()) as port, Raw(port) as silent, Raw(port) as half:
        half.send(b"GET / HTTP/1.1\r\nhost: ")
        with Raw(port) as slow, Raw(port) as second:

            def drip() -> None:
                while not stop.wait(0.02):
                    slow.send(b"x")

            second.send(request("/health", method="GET") + b"GET /").read()
            slow.send(b"GET / HTTP/1.1\r\nx: ")
            dripping = threading.Thread(target=drip)
            dripping.start()
            statuses = [late.read().status for late in (half, slow, second)]
            stop.set()
            dripping.join()
            assert statuses == [408, 408, 408]
            assert all(late.is_closed() for late in (silent, half, slow, second))


def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.2: also those that send empty lines."""
    monkeypatch.setattr(limits, "IDLE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("headrace.api.server._SWEEP_S", 0.05)
    with serving(FakeBackend(), ApiSettings()) as port, Raw(port) as idle:
        assert idle.send(request("/health", method="GET")).read().status == 200
        idle.send(b"\r\n\r\n")
        assert idle.is_closed()


def test_a_bound_of_connections_without_a_request() -> None:
    """Issue 11.2: those that have waited longest are closed; requests and new clients are not."""
    go = threading.Event()
    health = request("/health", method="GET")
    backend = FakeBackend(lambda request: [lambda: asyncio.to_thread(go.wait, 20), *hello(request)])
    with serving(backend, ApiSettings(), max_idle=4) as port, Raw(port) as running:
        running.send(request(CHAT, STREAM))
        with Raw(port) as other:
            while not backend.requests:
                assert other.send(health).read().status == 200
        waiting = [Raw(port) for _ in range(10)]
        assert all(raw.is_closed() for raw in waiting[:6])
        assert [raw.send(health).read().status for raw in waiting[6:]] == [200] * 4
        go.set()
        assert running.read().status == 200
        for raw in waiting:
            raw.close()


def test_a_slow_reader_is_waited_for() -> None:
    """Issue 11.3: what a client does not read stays where it is; then it gets all of it."""
    sent = list[int]()

    def long(request: AnyRequest) -> Iterable[Any]:
        for number in range(400):
            sent.append(number)
            yield Delta("x" * 40_000, (1,))
        yield from hello(request)

    with serving(FakeBackend(long), ApiSettings()) as port, Raw(port) as raw:
        raw.send(request(CHAT, STREAM))
        before = -1
        while before != len(sent) or not sent:
            before = len(sent)
            time.sleep(0.1)
        assert len(sent) < 300, "what the buffers of the system take, and little more"
        body = raw.read().body
        assert len(sent) == 400
        assert body.count(b"x" * 40_000) == 400
        assert body.endswith(b"data: [DONE]\n\n")


def test_a_client_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.2: an answer that is not taken does not keep its connection for good."""
    monkeypatch.setattr(limits, "UNREAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr("headrace.api.server._SWEEP_S", 0.05)
    lost, close = [], Connection.connection_lost

    def connection_lost(self: Connection, exc: Exception | None) -> None:
        close(self, exc)
        lost.append(exc)

    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    backend = FakeBackend(lambda _: (Delta("x" * 40_000, (1,)) for _ in range(10**6)))
    with serving(backend, ApiSettings()) as port, Raw(port) as raw, Raw(port) as many:
        raw.send(request(CHAT, STREAM))
        many.send(request("/openapi.json", method="GET") * 500)
        # Who reads before the connection is cut gets more.
        wait_until(lambda: len(lost) == 2 and bool(backend.ended))
        assert raw.read_all().startswith(b"HTTP/1.1 200 OK\r\n")
        assert many.read_all().count(b"HTTP/1.1 200 OK\r\n") < 500


@pytest.mark.parametrize("behind", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_client_that_leaves(behind: bytes) -> None:
    """Issue 11.3: seen at once, also when it has sent another request already."""
    backend = FakeBackend(lambda _: [Delta("x", (1,)), lambda: asyncio.sleep(60)])
    with serving(backend, ApiSettings()) as port:
        raw = Raw(port).send(request(CHAT, STREAM) + behind)
        while b"data: " not in raw.socket.recv(4096):
            pass
        raw.close()
        wait_until(lambda: bool(backend.ended))
        assert (backend.running, len(backend.ended)) == (0, 1)


def test_refusals_leave_no_garbage(port: int) -> None:
    """Issue 11.1: a flood of them is freed at once, not when the garbage collector runs."""
    bad = [b"NONSENSE\r\n\r\n", request(CHAT, b"g\r\n", "Transfer-Encoding: chunked")]
    gc.collect()
    gc.disable()
    try:
        for packet in bad * 10:
            with Raw(port) as raw:
                assert raw.send(packet).read().status == 400
                assert raw.is_closed()
        kinds = (Connection, Transaction, Refused, Exchange)
        wait_until(lambda: not any(isinstance(kept, kinds) for kept in gc.get_objects()))
    finally:
        gc.enable()


def test_refused_heads_are_in_the_access_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Issue 11.1: with a status and an id, as every answer."""
    caplog.set_level(logging.INFO, "headrace.access")
    with Raw(port) as raw:
        answer = raw.send(b"NONSENSE\r\n\r\n").read()
    wait_until(lambda: bool(caplog.records))
    data = [vars(record)["data"] for record in caplog.records if record.name == "headrace.access"]
    assert [(entry["status"], entry["outcome"]) for entry in data] == [(400, "refused")]
    assert data[0]["request_id"] == answer.headers["x-request-id"]
