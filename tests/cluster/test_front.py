"""A front and its nodes on a clock that jumps: what goes where, and what goes on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from tests.cluster.network import Host, Listing, Network, clock, me_of
from tests.pool.rig import ask, run

from headrace.cluster.directory import DnsDirectory, parse_address
from headrace.cluster.policy import Candidate, allows, choose_node, copies_of, fits
from headrace.cluster.pool import ClusterPool
from headrace.cluster.wire import Address
from headrace.core.errors import (
    ConfigError,
    DoesNotFit,
    Draining,
    HeadraceError,
    InvalidRequest,
    NodeGone,
    NoNode,
    QueueFull,
    UnknownModel,
)
from headrace.core.events import Delta, Finish
from headrace.core.request import GenerateRequest
from headrace.core.stream import collect


class Cluster:
    def __init__(self, count: int, *, copies: int = 2) -> None:
        self.network = Network()
        self.hosts = [Host(self.network, number, ["m"]) for number in range(1, count + 1)]
        self.listing = Listing([host.address for host in self.hosts])
        self.front = ClusterPool([self.listing], me_of("front"), self.network.connect, clock)
        for host in self.hosts:
            host.start().copies = copies

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def served_by(self, request: GenerateRequest) -> list[str]:
        """The names of the nodes that have had a request."""
        return [
            host.name
            for host in self.hosts
            for node in host.nodes
            if request.id in [one.id for one in node.requests]
        ]


@asynccontextmanager
async def opened(count: int = 2, *, copies: int = 2) -> AsyncGenerator[Cluster]:
    cluster = Cluster(count, copies=copies)
    await cluster.front.start()
    await asyncio.sleep(5.0)
    try:
        yield cluster
    finally:
        await cluster.front.aclose()
        for host in cluster.hosts:
            host.kill()
        await asyncio.sleep(1.0)


class Reply:
    """An answer, the longest wait for a part of it, and how it went on."""

    def __init__(self) -> None:
        self.text, self.gap_s = "", 0.0
        self.finish: Finish | None = None


async def answer(
    cluster: Cluster,
    request: GenerateRequest,
    halfway: Callable[[str], Awaitable[None] | None] | None = None,
) -> Reply:
    """Read an answer; `halfway` gets the name of its node after five tokens."""
    reply, last, parts = Reply(), clock(), 0
    async for event in cluster.front.ask(request):
        if isinstance(event, Delta):
            reply.gap_s, last = max(reply.gap_s, clock() - last), clock()
            reply.text += event.text
            parts += 1
            if parts == 5 and halfway is not None:
                halfway(cluster.served_by(request)[0])
        elif isinstance(event, Finish):
            reply.finish = event
    return reply


def counted(tokens: int) -> str:
    return "".join(f"{number} " for number in range(tokens))


def test_an_answer_goes_on_elsewhere_after_a_kill() -> None:
    """Issue 15, shown 3: byte-identical, and the gap is the time for the next token."""

    async def main() -> None:
        async with opened() as cluster:
            request = ask("m", 20)
            reply = await answer(cluster, request, lambda name: cluster.host(name).kill())
            assert reply.text == counted(20)
            assert reply.gap_s <= 0.3
            assert reply.finish is not None
            assert reply.finish.metrics.continuations == 1
            assert sorted(cluster.served_by(request)) == ["n1", "n2"]

    run(main())


def test_an_answer_goes_on_elsewhere_after_silence() -> None:
    """Issue 15, shown 3: a partition is noticed after `silence_s`."""

    async def main() -> None:
        async with opened() as cluster:

            def silence(name: str) -> None:
                cluster.network.held.add(cluster.host(name).address)

            reply = await answer(cluster, ask("m", 20), silence)
            assert reply.text == counted(20)
            assert 2.0 <= reply.gap_s <= 2.0 + 0.3
            # The node that was cut off does not go on for a client that is gone.
            await asyncio.sleep(5.0)
            assert not any(node.running for host in cluster.hosts for node in host.nodes)

    run(main())


def test_an_answer_goes_on_once() -> None:
    async def main() -> None:
        async with opened(3, copies=3) as cluster:
            request = ask("m", 20)
            with pytest.raises(NodeGone):
                async for event in cluster.front.ask(request):
                    if isinstance(event, Delta) and event.text in ("4 ", "9 "):
                        cluster.host(cluster.served_by(request)[-1]).kill()
                        for name in cluster.served_by(request):
                            cluster.host(name).kill()
            assert len(cluster.served_by(request)) == 2

    run(main())


def test_an_answer_goes_on_at_a_node_with_a_full_queue() -> None:
    """Issue 15.1: an answer that has begun does not end with a 429; one that has not does."""

    async def main() -> None:
        async with opened() as cluster:

            def fill_and_kill(name: str) -> None:
                for host in cluster.hosts:
                    assert host.node is not None
                    host.node.refusal = QueueFull("full", retry_after_s=3.0)
                cluster.host(name).kill()

            reply = await answer(cluster, ask("m", 20), fill_and_kill)
            assert reply.text == counted(20)
            assert reply.gap_s <= 0.3
            with pytest.raises(QueueFull):
                await answer(cluster, ask("m", 3))

    run(main())


@pytest.mark.parametrize("planned", [True, False])
def test_an_answer_that_has_begun_waits_for_a_node(planned: bool) -> None:
    """Issue 15, shown 3: the only node is restarted; the answer goes on when it is back."""

    async def main() -> None:
        async with opened(1) as cluster:
            host = cluster.hosts[0]

            def restart(_name: str) -> None:
                if planned and host.node is not None:
                    host.node.broken = Draining("The service is stopping.")
                loop = asyncio.get_running_loop()
                loop.call_later(0.3, host.kill)
                loop.call_later(2.0, host.start)

            reply = await answer(cluster, ask("m", 20), restart)
            assert reply.text == counted(20)
            assert reply.gap_s <= 9.0
            began = clock()
            with pytest.raises(NoNode):
                await answer(cluster, ask("m", 20), lambda _name: host.kill())
            assert clock() - began >= 10.0

    run(main())


def test_an_answer_does_not_wait_beyond_its_deadline() -> None:
    async def main() -> None:
        async with opened(1) as cluster:
            began = clock()
            with pytest.raises(NoNode):
                request = ask("m", 20, deadline_s=2.0)
                await answer(cluster, request, lambda name: cluster.host(name).kill())
            assert clock() - began <= 2.2

    run(main())


def test_a_drained_node_ends_its_answers_and_gets_no_more() -> None:
    """Issue 15.1: nothing new; what runs there ends there."""

    async def main() -> None:
        async with opened() as cluster:
            request = ask("m", 30)

            def drain(name: str) -> None:
                node = cluster.host(name).node
                assert node is not None
                node.set_draining(on=True)

            reply = await answer(cluster, request, drain)
            assert reply.text == counted(30)
            (drained,) = cluster.served_by(request)
            for _ in range(6):
                later = ask("m", 1)
                await answer(cluster, later)
                assert drained not in cluster.served_by(later)

    run(main())


def test_a_node_that_stops_lets_its_answers_go_on_elsewhere() -> None:
    """Issue 15, shown 3: an answer that takes longer than the drain does not fail."""

    async def main() -> None:
        async with opened() as cluster:
            request = ask("m", 20)

            def stop(name: str) -> None:
                node = cluster.host(name).node
                assert node is not None
                node.broken = Draining("The service is stopping.")

            reply = await answer(cluster, request, stop)
            assert reply.text == counted(20)
            assert len(cluster.served_by(request)) == 2

    run(main())


def test_an_answer_survives_a_roll_of_all_nodes() -> None:
    """Issue 15, shown 3: it goes on as often as its node stops, also where it was before."""

    async def roll(cluster: Cluster) -> str:
        host = next(host for host in cluster.hosts if host.node and host.node.running)
        assert host.node is not None
        host.node.broken = Draining("The service is stopping.")
        await asyncio.sleep(0.2)
        host.kill()
        host.start()
        return host.name

    async def main() -> None:
        async with opened() as cluster:
            text, rolled = "", list[str]()
            async for event in cluster.front.ask(ask("m", 60)):
                if isinstance(event, Delta):
                    text += event.text
                    if event.text in ("4 ", "24 ", "44 "):
                        rolled.append(await roll(cluster))
                elif isinstance(event, Finish):
                    assert event.metrics.continuations == 3
            assert text == counted(60)
            assert len({*rolled}) == 2

    run(main())


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (Draining("stopping"), True),
        (QueueFull("full", retry_after_s=3.0), True),
        (DoesNotFit("too large"), True),
        (InvalidRequest("wrong", param="n"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_that_is_refused_before_it_begins(error: HeadraceError, elsewhere: bool) -> None:
    """Issue 15.1: another node gets it; a wrong request is wrong everywhere."""

    async def main() -> None:
        async with opened() as cluster:
            first = cluster.front.view.choose("m")
            assert first is not None
            refusing = cluster.host(first.name).node
            assert refusing is not None
            refusing.refusal = error
            request = ask("m", 3)
            if elsewhere:
                assert (await answer(cluster, request)).text == counted(3)
            else:
                with pytest.raises(type(error)):
                    await answer(cluster, request)
            for host in cluster.hosts:
                assert host.node is not None
                host.node.refusal = error
            with pytest.raises(type(error)) as raised:
                await answer(cluster, ask("m", 3))
            assert raised.value.retry_after_s == error.retry_after_s

    run(main())


def test_an_adapter_that_few_nodes_have() -> None:
    """Issue 15.2, 17.4: one that was added before other nodes came; its aliases are names too."""

    async def main() -> None:
        async with opened(6) as cluster:
            able = cluster.hosts[-1].node
            assert able is not None
            able.adapters = ("m:new",)
            await asyncio.sleep(2.0)
            request = ask("m:new", 3)
            assert (await answer(cluster, request)).text == counted(3)
            assert cluster.served_by(request)[-1] == able.name
            able.adapters = ()
            with pytest.raises(UnknownModel):
                await answer(cluster, ask("m:new", 3))

    run(main())


def test_a_task_that_fails_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15.1: without it nothing would show why a front loads no models any more."""

    async def main() -> None:
        async with opened() as cluster:
            monkeypatch.delattr(cluster.front.placing, "_clock")
            await asyncio.sleep(2.0)
            (record,) = [r for r in caplog.records if r.message == "headrace.cluster.task"]
            assert record.__dict__["data"] == {"task": "housekeeping of the cluster"}
            assert record.exc_info is not None

    run(main())


def test_no_node_at_all() -> None:
    """Issue 15.1: try again later, and not that the model is unknown."""

    async def main() -> None:
        async with opened() as cluster:
            with pytest.raises(UnknownModel):
                await answer(cluster, ask("other"))
            for host in cluster.hosts:
                host.kill()
            await asyncio.sleep(1.0)
            for name in ("m", "other"):
                with pytest.raises(NoNode) as raised:
                    await answer(cluster, ask(name))
                assert raised.value.retry_after_s
            assert not cluster.front.ready
            cluster.hosts[0].start()
            await asyncio.sleep(6.0)
            assert (await answer(cluster, ask("m", 3))).text == counted(3)

    run(main())


def test_an_empty_directory_drops_no_node() -> None:
    """Cluster notes 5.1: a directory is a hint; a restarted, empty one made all requests fail."""

    async def main() -> None:
        async with opened() as cluster:
            cluster.listing.content = []
            await asyncio.sleep(5.0)
            assert len(cluster.front.connected) == 2
            assert (await answer(cluster, ask("m", 3))).text == counted(3)
            # Nor does it keep a node from coming back, long after it was lost.
            cluster.hosts[0].kill()
            await asyncio.sleep(900.0)
            cluster.hosts[0].start()
            await asyncio.sleep(6.0)
            assert len(cluster.front.connected) == 2

    run(main())


def test_addresses_that_are_gone_are_forgotten() -> None:
    """Pods get new addresses: the old ones would be tried without end."""

    async def main() -> None:
        async with opened() as cluster:
            cluster.hosts[0].kill()
            cluster.listing.content = [cluster.hosts[1].address]
            await asyncio.sleep(500.0)
            assert len(cluster.front.links) == 2
            await asyncio.sleep(200.0)
            assert [*cluster.front.links] == [cluster.hosts[1].address]

    run(main())


@pytest.mark.parametrize(
    ("nodes", "copies", "placed"), [(3, 2, [1, 1]), (2, 2, [1, 1]), (1, 2, [2]), (2, 4, [2, 2])]
)
def test_replicas_are_on_distinct_nodes_first(nodes: int, copies: int, placed: list[int]) -> None:
    """Issue 15.2."""

    async def main() -> None:
        async with opened(nodes, copies=copies) as cluster:
            counts = [host.node.placed[-1][1] for host in cluster.hosts if host.node.placed]  # type: ignore[union-attr]
            assert counts == placed
            states = [host.node.states["m"] for host in cluster.hosts if host.node]
            assert states.count("ready") == len(placed)

    run(main())


def test_a_lost_replica_is_placed_anew() -> None:
    async def main() -> None:
        async with opened(3, copies=2) as cluster:
            loaded = [h for h in cluster.hosts if h.node and h.node.states["m"] == "ready"]
            assert len(loaded) == 2
            loaded[0].kill()
            await asyncio.sleep(4.0)
            # It may come back; and its answers are at the other one now.
            assert len(cluster.front.view.ready("m")) == 1
            await asyncio.sleep(4.0)
            assert len(cluster.front.view.ready("m")) == 2

    run(main())


def test_a_node_that_is_restarted_gets_its_model_and_no_other_a_second_one() -> None:
    """Issue 15, shown 3: loads beside running answers were their longest gaps."""

    async def main() -> None:
        async with opened() as cluster:
            lost, other = cluster.hosts
            assert other.node is not None
            before = [*other.node.placed]
            lost.kill()
            await asyncio.sleep(3.0)
            node = lost.start()
            await asyncio.sleep(9.0)
            assert node.states["m"] == "ready"
            assert other.node.placed == before

    run(main())


def test_a_front_that_starts_ends_workers_that_are_too_many() -> None:
    """Issue 15.2: a node got two while the other was lost, by a front that is gone."""

    async def main() -> None:
        async with opened() as cluster:
            lost, other = cluster.hosts
            assert other.node is not None
            lost.kill()
            await asyncio.sleep(8.0)
            assert other.node.placed[-1] == ("m", 2)
            await cluster.front.aclose()
            lost.start()
            cluster.front = ClusterPool(
                [cluster.listing], me_of("front"), cluster.network.connect, clock
            )
            await cluster.front.start()
            await asyncio.sleep(8.0)
            assert len(cluster.front.view.ready("m")) == 2
            assert other.node.placed[-1] == ("m", 1)

    run(main())


def test_a_node_that_comes_and_goes_does_not_keep_others_from_their_models() -> None:
    async def main() -> None:
        async with opened(3, copies=2) as cluster:
            lost, other = [h for h in cluster.hosts if h.node and h.node.states["m"] == "ready"]
            spare = next(host for host in cluster.hosts if host not in (lost, other))
            for _ in range(5):
                lost.kill()
                await asyncio.sleep(3.0)
                lost.start()
                await asyncio.sleep(1.5)
            assert spare.node is not None
            assert "ready" in (spare.node.states["m"], lost.node and lost.node.states["m"])

    run(main())


def test_a_front_that_starts_waits_until_all_nodes_were_tried() -> None:
    """A node that is slow to greet would let the others load twice, and end that again."""

    async def main() -> None:
        network = Network()
        hosts = [Host(network, number, ["m"]) for number in (1, 2)]
        for host in hosts:
            host.start().copies = 2
        network.held.add(hosts[1].address)
        listing = Listing([host.address for host in hosts])
        front = ClusterPool([listing], me_of("front"), network.connect, clock)
        await front.start()
        await asyncio.sleep(3.0)
        network.release(hosts[1].address)
        await asyncio.sleep(4.0)
        assert [host.node.placed for host in hosts if host.node] == [[("m", 1)], [("m", 1)]]
        await front.aclose()
        for host in hosts:
            host.kill()
        await asyncio.sleep(1.0)

    run(main())


def test_a_load_that_did_not_succeed_is_ordered_again() -> None:
    """For a while there may be too little memory for a model that evicts no other."""

    async def main() -> None:
        async with opened(3, copies=2) as cluster:
            lost, other = [h for h in cluster.hosts if h.node and h.node.states["m"] == "ready"]
            spare = next(h for h in cluster.hosts if h not in (lost, other)).node
            assert spare is not None
            spare.full = True
            lost.kill()
            await asyncio.sleep(10.0)
            assert spare.placed
            assert [node.name for node in cluster.front.view.ready("m")] == [other.name]
            spare.full = False
            await asyncio.sleep(40.0)
            assert len(cluster.front.view.ready("m")) == 2

    run(main())


def test_the_streams_of_a_front_that_is_gone() -> None:
    """Issue 15, shown 3: they end at the nodes; those of the other front go on."""

    async def main() -> None:
        async with opened() as cluster:
            other = ClusterPool([cluster.listing], me_of("other"), cluster.network.connect, clock)
            await other.start()
            await asyncio.sleep(5.0)
            mine = [asyncio.ensure_future(answer(cluster, ask("m", 40))) for _ in range(4)]
            theirs = [asyncio.ensure_future(collect(other.ask(ask("m", 40)))) for _ in range(4)]
            await asyncio.sleep(1.0)
            assert sum(host.node.running for host in cluster.hosts if host.node) == 8
            await other.aclose()
            assert len(await asyncio.gather(*theirs, return_exceptions=True)) == 4
            await asyncio.sleep(0.5)
            assert sum(host.node.running for host in cluster.hosts if host.node) == 4
            assert [reply.text for reply in await asyncio.gather(*mine)] == [counted(40)] * 4

    run(main())


def test_times_are_those_of_the_front() -> None:
    """Issue 15.1: clocks of machines differ; deadlines and figures do not."""

    async def main() -> None:
        network = Network()
        host = Host(network, 1, ["m"], ahead_s=5000.0)
        node = host.start()
        front = ClusterPool([Listing([host.address])], me_of("f"), network.connect, clock)
        await front.start()
        await asyncio.sleep(5.0)
        request = ask("m", 5, deadline_s=30.0, received=clock() - 2.0)
        events = [event async for event in front.ask(request)]
        finish = events[-1]
        assert isinstance(finish, Finish)
        (got,) = node.requests
        assert got.deadline is not None
        # It has waited two seconds at the front: what is left counts from now, there.
        assert got.deadline - (clock() + 5000.0) == pytest.approx(30.0 - 2.5, abs=0.1)
        assert finish.metrics.total_ms == pytest.approx(2500.0, abs=50)
        assert finish.metrics.started_at > 1e9, "the node's wall clock says 7"
        assert finish.metrics.worker == "n1"
        await front.aclose()
        host.kill()
        await asyncio.sleep(1.0)

    run(main())


def test_requests_with_one_beginning_go_to_one_node() -> None:
    async def main() -> None:
        async with opened(4, copies=4) as cluster:
            first = ask("m", 1, prompt="A long beginning. " * 100)
            await answer(cluster, first)
            for _ in range(8):
                again = ask("m", 1, prompt="A long beginning. " * 100 + "More.")
                await answer(cluster, again)
                assert cluster.served_by(again) == cluster.served_by(first)
            busy = [asyncio.ensure_future(answer(cluster, ask("m", 20))) for _ in range(40)]
            await asyncio.sleep(0.5)
            counts = sorted(host.node.running for host in cluster.hosts if host.node)
            assert sum(counts) == 40
            assert counts[-1] - counts[0] <= 3
            await asyncio.gather(*busy)

    run(main())


def candidates(**given: object) -> list[Candidate]:
    return [Candidate(name, **facts) for name, facts in given.items()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, None),
        ({"a": {"ready": True, "load": 0.5}, "b": {"ready": True, "load": 0.25}}, "b"),
        ({"a": {"ready": True, "load": 3.0}, "b": {"free": 99, "fits": True}}, "a"),
        ({"a": {"ready": True, "load": 0.2, "matched": 3}, "b": {"ready": True}}, "a"),
        ({"a": {"ready": True, "load": 0.9, "matched": 3}, "b": {"ready": True}}, "b"),
        ({"a": {"loading": True}, "b": {"free": 99, "fits": True}}, "a"),
        ({"a": {"idle": 99}, "b": {"free": 9, "idle": 9, "fits": True}}, "b"),
        ({"a": {"idle": 99}, "b": {"idle": 9}}, "a"),
        ({"a": {"fits": True, "free": 99, "failed": True}, "b": {"idle": 9}}, "b"),
        ({"a": {"rank": 2}, "b": {"rank": 1}}, "b"),
    ],
)
def test_choose_node(given: dict[str, object], chosen: str | None) -> None:
    """Issue 15.1: loaded, load, prefix, memory."""
    assert choose_node(candidates(**given)) == chosen


def test_labels_copies_and_memory() -> None:
    assert allows((), "a", ())
    assert allows(("gpu", "big"), "a", ("gpu",))
    assert allows(("a",), "a", ())
    assert not allows(("gpu",), "a", ("cpu",))
    assert [copies_of(2, nodes) for nodes in (0, 1, 2, 3)] == [2, 2, 1, 1]
    assert fits(None, {})
    assert fits({"cuda:0": 5}, {"cpu": 9, "cuda:0": 3, "cuda:1": 3})
    assert not fits({"cpu": 10}, {"cpu": 9, "cuda:0": 30})


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:70000", ":1", "host:x"])
def test_an_address_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)
    assert parse_address("[::1]:5") == Address("::1", 5)
    assert str(Address("::1", 5)) == "[::1]:5"


async def test_dns() -> None:
    """All addresses of a name; a name that does not resolve yields none, and goes on."""
    directory = DnsDirectory(Address("localhost", 11512))
    async for addresses in directory.addresses():
        assert Address("127.0.0.1", 11512) in addresses
        break
    missing = DnsDirectory(Address("no-such-name.invalid", 11512), every_s=0.01)
    seen = 0
    async for addresses in missing.addresses():
        assert not addresses
        seen += 1
        if seen == 2:
            break
