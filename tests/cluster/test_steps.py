"""Nodes join, are killed, fall silent and drain at random, while requests come."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.cluster.network import Host, Listing, Network, clock, me_of
from tests.conftest import TEST_ROUNDS
from tests.pool.rig import TimeLoop, ask

from headrace.cluster.pool import ClusterPool
from headrace.core.errors import HeadraceError, NodeGone, NoNode
from headrace.core.events import Delta, Finish

MODELS = ("m", "k")
SILENCE_S = 2.0


class Asked:
    """One request, and what came of it."""

    def __init__(self, world: World, model: str, tokens: int) -> None:
        self.began = clock()
        self.tokens = tokens
        self.text = ""
        self.finish: Finish | None = None
        self.error: HeadraceError | None = None
        self.closed = False
        self.gaps: list[float] = []
        self.world = world
        self.task = asyncio.ensure_future(self.run(world.front, model))

    async def run(self, front: ClusterPool, model: str) -> None:
        last = clock()
        stream = front.ask(ask(model, self.tokens))
        try:
            async for event in stream:
                if isinstance(event, Delta):
                    self.gaps.append(clock() - last)
                    last = clock()
                    self.text += event.text
                elif isinstance(event, Finish):
                    self.finish = event
        except HeadraceError as error:
            self.error = error
        finally:
            await stream.aclose()

    def check(self) -> None:
        """A whole answer is exact; a failed one had no other node, or lost two."""
        whole = "".join(f"{number} " for number in range(self.tokens))
        assert whole.startswith(self.text), "another text than one node alone gives"
        if self.finish is not None:
            assert self.text == whole
            return
        losses = [at for at in self.world.losses if self.began - SILENCE_S - 1 <= at]
        if isinstance(self.error, NoNode):
            assert self.world.was_empty_since(self.began - SILENCE_S - 6), self.error
        elif isinstance(self.error, NodeGone):
            assert len(losses) >= 2 or self.world.was_empty_since(self.began - SILENCE_S - 6)
        else:
            assert self.closed, f"unexpected: {self.error!r}"


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loop = TimeLoop()
        self.complaints: list[object] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.network = Network()
        self.hosts = [Host(self.network, number, MODELS) for number in range(1, 5)]
        self.listing = Listing([host.address for host in self.hosts], every_s=2.0)
        self.asked: list[Asked] = []
        self.losses: list[float] = []
        self.empty: list[float] = []
        self.answered = self.continued = self.failed = 0
        self.loop.run_until_complete(self.open())

    async def open(self) -> None:
        for host in self.hosts[:3]:
            host.start()
        self.front = ClusterPool([self.listing], me_of("front"), self.network.connect, clock)
        await self.front.start()
        await asyncio.sleep(3.0)

    def was_empty_since(self, at: float) -> bool:
        """Whether there was a time when no node could take requests, or could just be reached."""
        return any(empty >= at for empty in self.empty)

    async def step(self) -> None:
        host = self.random.choice(self.hosts)
        action = self.random.choices(
            (self.request, self.leave, self.kill, self.join, self.silence, self.drain, self.forget),
            (60, 4, 2, 25, 2, 6, 1),
        )[0]
        action(host)
        await asyncio.sleep(self.random.choice((0.0, 0.02, 0.1, 0.3)))
        self.check()

    def request(self, _host: Host) -> None:
        if len([one for one in self.asked if not one.task.done()]) < 12:
            self.asked.append(Asked(self, self.random.choice(MODELS), self.random.randint(1, 30)))

    def leave(self, _host: Host) -> None:
        running = [one for one in self.asked if not one.task.done()]
        if running:
            one = self.random.choice(running)
            one.closed = True
            one.task.cancel()

    def kill(self, host: Host) -> None:
        if host.node is not None:
            self.losses.append(clock())
            host.kill()

    def join(self, host: Host) -> None:
        if host.address in self.network.held:
            self.network.release(host.address)
            if host.node is not None and host.node.draining:
                # The front learns it only now.
                host.node.drained_at = clock()
        elif host.node is None:
            host.start()
        elif host.node.draining:
            host.node.set_draining(on=False)

    def silence(self, host: Host) -> None:
        if host.node is not None and host.address not in self.network.held:
            self.losses.append(clock())
            self.network.held.add(host.address)

    def drain(self, host: Host) -> None:
        if host.node is not None:
            host.node.set_draining(on=self.random.random() < 0.5)

    def forget(self, _host: Host) -> None:
        """The directory restarts, and knows none for a while."""
        self.listing.content = self.random.choice(([], [host.address for host in self.hosts]))

    def usable(self) -> list[Host]:
        """Return the nodes that take requests, as the front knows by now."""
        nodes = self.front.view.nodes
        return [
            host
            for host in self.hosts
            if host.node and not host.node.draining and host.address not in self.network.held
            if host.name in nodes and not nodes[host.name].draining
        ]

    def check(self) -> None:
        assert not self.complaints, self.complaints
        if len(self.usable()) < 2:
            # With one, a request that it has lost has no other.
            self.empty.append(clock())
        front = self.front
        up = {link.name for link in front.links.values() if link.is_up}
        assert up == set(front.connected) == set(front.view.nodes)
        for one in [one for one in self.asked if one.task.done()]:
            one.check()
            self.asked.remove(one)
            self.answered += one.finish is not None
            self.failed += one.error is not None
            if one.finish is not None:
                self.continued += one.finish.metrics.continuations
        for host in self.hosts:
            for node in host.nodes:
                assert not node.late, f"{node.name} drains, and got a request"

    async def settle(self) -> None:
        for host in self.hosts:
            self.network.release(host.address)
            if host.node is None:
                host.start()
            host.node.set_draining(on=False) if host.node else None
        await asyncio.sleep(60.0)
        self.check()
        assert not self.asked, "a request waits without end"
        assert {host.name for host in self.hosts} == set(self.front.connected)
        assert all(not link.open_streams for link in self.front.links.values())
        assert not any(node.running for host in self.hosts for node in host.nodes)
        assert not any(
            model.open for node in self.front.view.nodes.values() for model in node.models.values()
        )
        await self.front.aclose()
        for host in self.hosts:
            host.kill()
        await asyncio.sleep(1.0)


def walk(seed: int, steps: int) -> World:
    world = World(seed)
    for _ in range(steps):
        world.loop.run_until_complete(world.step())
    world.loop.run_until_complete(world.settle())
    world.loop.close()
    return world


@pytest.mark.parametrize("seed", range(1, 1 + (TEST_ROUNDS or 4)))
def test_random_steps(seed: int) -> None:
    """Issue 15, shown 1: 10,000 steps of join, cut, silence and drain, in four worlds."""
    world = walk(seed, 2500)
    assert world.answered > 500
    assert world.continued > 20
