"""Who may connect to a node or a front, and what bytes of strangers can do."""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cluster.network import FakeNode
from tests.cluster.rig import front, member, node, until

from headrace import config
from headrace.cluster import secure
from headrace.cluster.directory import parse_address
from headrace.cluster.link import NodeLink
from headrace.cluster.node import NodeServer
from headrace.cluster.pool import ClusterPool
from headrace.cluster.secure import Credentials, Identity, Member, Refusal
from headrace.cluster.strangers import Strangers
from headrace.cluster.wire import (
    GREETINGS,
    MAX_GREETING,
    Address,
    Begin,
    Hello,
    Proof,
    Refused,
)
from headrace.config.cluster import ClusterSettings
from headrace.core.errors import ConfigError
from headrace.core.events import Delta, Event
from headrace.core.request import AnyRequest, GenerateRequest
from headrace.pool.pool import Pool

Opened = tuple[NodeServer, Address, FakeNode]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    fake = FakeNode("a", ["m"])
    async with node("a", fake, fake) as (server, address):
        yield server, address, fake


NEW = "not connected yet"


def failure(pool: ClusterPool, address: Address) -> str:
    """Why an address is not connected; empty before the front has it from its directory."""
    return pool.links[address].failure if address in pool.links else ""


class Stranger:
    """A connection that a test writes by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *messages: msgspec.Struct) -> None:
        payload = msgspec.msgpack.encode(messages)
        self.writer.write(struct.pack(">I", len(payload)) + payload)

    async def read(self) -> list[object]:
        (length,) = struct.unpack(">I", await self.reader.readexactly(4))
        return list(GREETINGS.decode(await self.reader.readexactly(length)))

    async def rest(self) -> bytes:
        """Everything until the node closes."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@asynccontextmanager
async def stranger(address: Address, own: str = "127.0.0.1") -> AsyncIterator[Stranger]:
    reader, writer = await asyncio.open_connection(*address, local_addr=(own, 0))
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_front_with_another_token_is_refused(opened: Opened) -> None:
    """Issue 15.1: and it says why; its requests are never decoded."""
    server, address, fake = opened
    for token in (b"", b"another token of a test"):
        async with front([address], member("f", token)) as pool:
            await until(lambda pool=pool: "token" in failure(pool, address))
            assert not pool.connected
    assert not server.fronts
    assert not fake.requests


async def test_a_node_with_another_token_is_refused(opened: Opened) -> None:
    """The proof is demanded in both directions: a node cannot collect the requests of others."""
    _, address, _ = opened
    async with stranger(address) as connection:
        hello = member("f").identity.hello()
        connection.send(hello)
        (answer,) = await connection.read()
        assert isinstance(answer, Hello)
        # What the node gets is its own proof of another connection, or that of the wrong side.
        connection.send(Proof(secure.proof(b"", "front", hello, answer)))
        (refused,) = await connection.read()
        assert isinstance(refused, Refused)
        assert "token" in refused.reason
        assert await connection.rest() == b""


def test_a_proof_is_of_one_side_and_one_connection() -> None:
    me, other = member("f").identity.hello(), member("a").identity.hello()
    mac = secure.proof(b"token", "front", me, other)
    secure.verify(mac, b"token", "front", me, other)
    again = member("a").identity.hello()
    for token, side, hello in (
        (b"token", "node", other),
        (b"other", "front", other),
        (b"token", "front", again),
    ):
        with pytest.raises(Refusal):
            secure.verify(mac, token, side, me, hello)  # type: ignore[arg-type]


async def test_a_request_before_the_proof_ends_the_connection(opened: Opened) -> None:
    _, address, fake = opened
    async with stranger(address) as connection:
        connection.send(member("f").identity.hello())
        await connection.read()
        connection.send(Begin(1, GenerateRequest(model="m", prompt="x")))
        await connection.rest()
        assert not fake.requests


async def test_a_greeting_is_short(opened: Opened) -> None:
    """A limit holds while bytes come in: the length is refused before what it announces."""
    _, address, _ = opened
    async with stranger(address) as connection:
        connection.writer.write(struct.pack(">I", MAX_GREETING + 1))
        assert await connection.rest() == b""


async def test_another_protocol_is_refused_by_name(opened: Opened) -> None:
    _, address, _ = opened
    async with stranger(address) as connection:
        hello = member("f").identity.hello()
        connection.send(msgspec.structs.replace(hello, protocol=99, version="9.9"))
        (refused,) = await connection.read()
        assert isinstance(refused, Refused)
        assert "protocol 99" in refused.reason
        assert "9.9" in refused.reason


async def test_two_nodes_of_one_name(opened: Opened) -> None:
    """The second one is not taken, and the front shows why."""
    _, address, _ = opened
    fake = FakeNode("a", ["m"])
    async with node("a", fake, fake) as (_, other), front([address, other]) as pool:
        await until(lambda: any("already" in link.failure for link in pool.links.values()))
        assert [*pool.connected] == ["a"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_needs_a_token_or_certificates(host: str) -> None:
    """Issue 15.1: never beyond loopback without one of the two."""
    settings = ClusterSettings(wire_host=host, wire_port=0)
    with pytest.raises(ConfigError, match=r"token_file or cluster\.tls"):
        secure.listen(settings, Credentials())
    secure.listen(settings, Credentials(b"a token of this test")).close()
    secure.listen(ClusterSettings(wire_port=0), Credentials()).close()


@pytest.mark.parametrize(
    ("text", "fault"), [("", "16"), ("short", "16"), (None, "No such file")], ids=str
)
def test_a_token_is_checked(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        secure.credentials(ClusterSettings(token_file=path))


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text(
        '[cluster]\ntoken_file = "t"\ntls = { cert = "c", key = "k", ca = "../ca" }\n'
    )
    cluster = config.load(environ={}, cwd=tmp_path).config.cluster
    assert cluster.token_file == tmp_path / "t"
    assert cluster.tls is not None
    assert cluster.tls["cert"] == tmp_path / "c"
    (tmp_path / "headrace.toml").write_text('[cluster]\ntls = { cert = "c" }\nsilence_s = 0.1\n')
    with pytest.raises(ConfigError, match=r"(?s)cert, key and ca.*twice heartbeat_s"):
        config.load(environ={}, cwd=tmp_path)


def certificates(folder: Path, *names: str) -> dict[str, dict[str, Path]]:
    """Authorities of their own, each with one certificate, as docs/cluster.md makes them."""
    made = {}
    for name in names:
        files = {part: folder / f"{name}.{part}" for part in ("cert", "key", "ca")}
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        request, authority = folder / f"{name}.csr", folder / f"{name}.ca.key"
        for command in (
            ["req", "-x509", *new, "-keyout", authority, "-out", files["ca"], "-subj", "/CN=ca"],
            ["req", *new, "-keyout", files["key"], "-out", request, "-subj", "/CN=node"],
            [
                *("x509", "-req", "-in", request, "-CA", files["ca"], "-CAkey", authority),
                *("-CAcreateserial", "-out", files["cert"]),
            ],
        ):
            subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
        made[name] = files
    return made


async def test_tls_in_both_directions(tmp_path: Path) -> None:
    """Issue 15.1: a certificate of the cluster's authority is needed on both sides."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    files = certificates(tmp_path, "ours", "others")
    access = {name: secure.credentials(ClusterSettings(tls=files[name])) for name in files}
    assert not access["ours"].is_open
    fake = FakeNode("a", ["m"])
    us = Member(Identity("a", "1"), access["ours"])
    async with node("a", fake, fake, member=us) as (server, address):
        async with front([address], Member(Identity("f", "1"), access["ours"])) as pool:
            await until(lambda: pool.connected)
        for wrong in (access["others"], Credentials()):
            async with front([address], Member(Identity("f", "2"), wrong)) as pool:
                await until(lambda pool=pool: failure(pool, address) not in ("", NEW))
                assert not pool.connected
                assert not server.fronts


@pytest.mark.parametrize("wrong", ["expired", "another authority"])
def test_a_certificate_that_others_would_not_accept(wrong: str, tmp_path: Path) -> None:
    """Issue 15.1: known at the start, and not only as connections that do not come."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    files, others = certificates(tmp_path, "ours", "others").values()
    if wrong == "another authority":
        files |= {"ca": others["ca"]}
    else:
        more = ("-CA", files["ca"], "-CAkey", tmp_path / "ours.ca.key", "-days", "-1")
        again = ("x509", "-req", "-in", tmp_path / "ours.csr", *more, "-out", files["cert"])
        subprocess.run(["openssl", *map(str, again)], check=True, capture_output=True)
    with pytest.raises(ConfigError, match=r"would not accept .*: .*(expired|signature)"):
        secure.credentials(ClusterSettings(tls=files))


async def test_a_second_node_of_a_name(caplog: pytest.LogCaptureFixture) -> None:
    """Issue 15.1: the first is kept; both sides report why the other is not, once."""
    caplog.set_level("INFO", logger="headrace.cluster")
    first, second = FakeNode("a", ["m"]), FakeNode("a", ["m"])
    async with (
        node("a", first, first) as (_, address),
        node("a", second, second) as (_, other),
        front([address, other]) as pool,
    ):
        why = "The node a is connected at"
        await until(lambda: why in failure(pool, address) + failure(pool, other))
        await until(lambda: "not_accepted" in caplog.text)
        await asyncio.gather(*(refused_again(pool.links[place]) for place in (address, other)))
        assert sorted(link.is_up for link in pool.links.values()) == [False, True]
        names = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert sorted(names) == ["headrace.cluster.node_refused", "headrace.cluster.not_accepted"]
        # The front that is not there for the second one has neither joined nor left it.
        await until(lambda: "front_joined" in caplog.text)
        assert caplog.text.count("front_joined") == 1
        assert "front_left" not in caplog.text


async def refused_again(link: NodeLink) -> None:
    """Wait for a further attempt, unless it is the connection that is kept."""
    before = link.node
    if not link.is_up:
        await until(lambda: link.node is not before)


@pytest.mark.parametrize("name", ["a..b", "." * 3, "x" * 64])
def test_a_name_that_no_resolver_takes(name: str) -> None:
    """Issue 15.1: it was an error in a task, and the front had no directory."""
    with pytest.raises(ConfigError, match="no HOST:PORT"):
        parse_address(f"{name}:11512")
    assert parse_address("[::1]:11512") == Address("::1", 11512)


class Flood(Pool):
    """A pool with one answer, which has no end."""

    def __init__(self, fake: FakeNode) -> None:
        self.fake = fake
        self.begun = asyncio.Event()

    def models(self) -> Any:
        return self.fake.models()

    async def relay(self, request: AnyRequest, deliver: Callable[[Event], None]) -> None:
        self.fake.running += 1
        self.begun.set()
        try:
            while True:
                deliver(Delta("x" * 10_000, (1,)))
                await asyncio.sleep(0)
        finally:
            self.fake.running -= 1


async def test_a_front_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 15.1: what waits for it is bounded, and its answers end."""
    monkeypatch.setattr("headrace.cluster.node.MAX_UNSENT", 1 << 16)
    monkeypatch.setattr("headrace.cluster.node.MAX_UNSENT_EVENTS", 100)
    fake = FakeNode("a", ["m"])
    me = member("a", silence_s=60.0)
    flood = Flood(fake)
    async with node("a", flood, fake, member=me) as (server, address):
        async with stranger(address) as connection:
            hello = member("f").identity.hello()
            connection.send(hello)
            (other,) = await connection.read()
            assert isinstance(other, Hello)
            connection.send(Proof(secure.proof(me.access.token, "front", hello, other)))
            connection.send(Begin(1, GenerateRequest(model="m", prompt="x")))
            await asyncio.wait_for(flood.begun.wait(), 20)
            await until(lambda: not server.fronts)
        await until(lambda: not fake.running)


async def test_frames_without_messages_do_not_lengthen_a_greeting(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.2: each was a sign of life, and 64 such connections kept all fronts out."""
    monkeypatch.setattr("headrace.cluster.strangers.GREETING_TIMEOUT_S", 0.5)
    server, address, _ = opened
    async with stranger(address) as connection, asyncio.timeout(20):
        with suppress(ConnectionError):
            while not connection.reader.at_eof():
                connection.send()
                await connection.writer.drain()
                await asyncio.sleep(0.05)
        await until(lambda: not server.strangers)


async def test_strangers_of_one_address_do_not_keep_others_out(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.2: the one of them that has waited longest is ended, not one of another address."""
    monkeypatch.setattr("headrace.cluster.strangers.MAX_STRANGERS", 3)
    server, address, _ = opened
    async with AsyncExitStack() as stack:

        async def come(own: str) -> Stranger:
            connection = await stack.enter_async_context(stranger(address, own))
            await until(lambda: len(server.strangers) >= min(3, len(came) + 1))
            came.append(connection)
            return connection

        came: list[Stranger] = []
        other = await come("127.0.0.2")
        first = await come("127.0.0.1")
        for _ in range(4):
            await come("127.0.0.1")
        assert await first.rest() == b""
        assert len(server.strangers) == 3
        hello = member("f").identity.hello()
        other.send(hello)
        assert isinstance((await other.read())[0], Hello)
        async with front([address]) as pool:
            await until(lambda: pool.connected)


async def test_handshakes_of_tls_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 11.2: those without an end were not counted, until the node had no more open files."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    monkeypatch.setattr("headrace.cluster.strangers.MAX_STRANGERS", 3)
    files = certificates(tmp_path, "ours")["ours"]
    access = secure.credentials(ClusterSettings(tls=files))
    fake = FakeNode("a", ["m"])
    async with (
        node("a", fake, fake, member=Member(Identity("a", "1"), access)) as (server, address),
        stranger(address) as first,
        AsyncExitStack() as stack,
    ):
        await until(lambda: len(server.strangers) == 1)
        for _ in range(4):
            await stack.enter_async_context(stranger(address))
        assert await first.rest() == b""
        assert len(server.strangers) <= 3
        async with front([address], Member(Identity("f", "1"), access)) as pool:
            await until(lambda: pool.connected)


async def test_a_stream_is_not_begun_twice() -> None:
    """The second took the first one's place, which was then never cancelled."""
    fake = FakeNode("a", ["m"])
    flood, me = Flood(fake), member("a", silence_s=60.0)
    async with node("a", flood, fake, member=me) as (server, address):
        async with stranger(address) as connection:
            hello = member("f").identity.hello()
            connection.send(hello)
            (other,) = await connection.read()
            assert isinstance(other, Hello)
            connection.send(Proof(secure.proof(me.access.token, "front", hello, other)))
            for _ in range(2):
                connection.send(Begin(1, GenerateRequest(model="m", prompt="x")))
            await connection.rest()
        await until(lambda: not server.fronts and not fake.running)


def test_what_strangers_do_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The same is logged once a minute, and so is not much that differs."""
    now = 0.0
    strangers = Strangers(lambda: now)
    for number in range(1000):
        for _ in range(2):
            strangers.note("headrace.cluster.refused", f"front {number}", "no token")
    assert 0 < len(caplog.records) < 50
    now, before = 61.0, len(caplog.records)
    strangers.note("headrace.cluster.refused", "front 0", "no token")
    assert len(caplog.records) == before + 1
