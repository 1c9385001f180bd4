"""Fronts: the fronts of a service, started again when one ends, and their connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence

import msgspec

from headrace.api import limits
from headrace.api.limits import ApiSettings
from headrace.core.model import ModelInfo
from headrace.fronts.process import FrontProcess, Home
from headrace.fronts.remote import log
from headrace.fronts.wire import Begin, Configured, Served

SILENCE_S = 10.0
"""How long a front may report nothing before it is ended, while this process runs."""

_LOOK_S = 1.0
_RECENT_S = 3.0
_FIRST_DELAY_S, _LONGEST_DELAY_S, _LASTING_S = 0.1, 5.0, 10.0
_AGAIN_S = 0.05
_ENDING_S = 2 * limits.CLOSE_TIMEOUT_S + 2.0


class Fronts:
    """Accepts connections, and gives each to the front that has the fewest.

    It takes the place of an `api.server.Server`; `begin` has the settings, and how many fronts.
    """

    def __init__(self, home: Home, begin: Begin) -> None:
        self._home = home
        self._begin = begin
        self._fronts: list[FrontProcess] = []
        self._listeners: list[socket.socket] = []
        self._held: list[socket.socket] = []
        self._sent: dict[str, ModelInfo] = {}
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        """Describe how many there are."""
        return f"<Fronts {len(self._fronts)} of {self._begin.fronts}>"

    async def run(self) -> None:
        """Keep the fronts running until `stop`, and wait for their end."""
        looking = asyncio.ensure_future(self._look())
        try:
            await asyncio.gather(*(self._keep(number) for number in range(self._begin.fronts)))
        finally:
            looking.cancel()
            self._over.set()

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections until `stop`, and wait for the end of the fronts."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._listen()
        await self._stopping.wait()
        await self._over.wait()

    def stop(self) -> None:
        """Accept no more connections, and close each after its answer."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._pause()
        for connection in self._held:
            connection.close()
        for front in self._fronts:
            front.stop()

    def abort(self) -> None:
        """End all fronts, and with them their connections."""
        for front in self._fronts:
            front.kill("was ended")

    def replace_settings(self, settings: ApiSettings) -> None:
        """Use other settings for later requests."""
        self._begin = msgspec.structs.replace(self._begin, settings=settings)
        for front in self._fronts:
            front.send(Configured(settings))

    def changed(self) -> None:
        """Send the fronts the models that have changed."""
        infos = {info.id: info for info in self._home.backend.models()}
        changed = [info for info in infos.values() if not _same(info, self._sent.get(info.id))]
        if changed or list(infos) != list(self._sent):
            self._sent = infos
            served = Served(tuple(changed), tuple(infos))
            for front in self._fronts:
                front.send(served)

    async def _keep(self, number: int) -> None:
        """Run a front, and another whenever it ends."""
        delay_s = _FIRST_DELAY_S
        while not self._stopping.is_set():
            began, front = time.monotonic(), FrontProcess(self._home)
            try:
                await self._run(front)
            except OSError as error:
                front.why = f"could not be started: {error}"
            if self._stopping.is_set():
                return
            log.error("headrace.fronts.died", extra={"data": {"number": number, "why": front.why}})
            if time.monotonic() - began > _LASTING_S:
                delay_s = _FIRST_DELAY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            delay_s = min(_LONGEST_DELAY_S, 2 * delay_s)

    async def _run(self, front: FrontProcess) -> None:
        self.changed()
        await front.start(self._begin, Served(tuple(self._sent.values()), tuple(self._sent)))
        self._fronts.append(front)
        if self._stopping.is_set():
            front.stop()
        else:
            self._listen()
        ending = asyncio.ensure_future(self._end(front))
        try:
            await front.gone.wait()
        finally:
            ending.cancel()
            self._fronts.remove(front)
            if not self._fronts:
                # Connections wait in the queues of the listeners.
                self._pause()

    async def _end(self, front: FrontProcess) -> None:
        """End a front that takes too long to stop."""
        await self._stopping.wait()
        await asyncio.sleep(_ENDING_S)
        front.kill("was slow to stop")

    async def _look(self) -> None:
        """End fronts that are silent; what they have sent is read, as this process has run."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            for front in self._fronts if now - looked < 2 * _LOOK_S else ():
                if now - front.heard > SILENCE_S:
                    front.kill(f"was silent for {SILENCE_S:g} s and was killed")
            looked = now

    def _listen(self) -> None:
        if self._fronts and not self._stopping.is_set():
            for listener in self._listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept one connection; the others that wait come in the next turns of the loop."""
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Too many open files: those that wait are accepted when there is room.
            log.warning("headrace.fronts.not_accepted", extra={"data": {"error": str(error)}})
            self._wait()
            return
        self._give(connection)

    def _give(self, connection: socket.socket) -> None:
        if any(front.give(connection) for front in self._by_load()):
            connection.close()
        else:
            self._held.append(connection)
            self._wait()

    def _by_load(self) -> Sequence[FrontProcess]:
        """Return the fronts that have the fewest connections first, silent ones last."""
        late = time.monotonic() - _RECENT_S
        return sorted(self._fronts, key=lambda front: (front.heard < late, front.connections))

    def _wait(self) -> None:
        self._pause()
        asyncio.get_running_loop().call_later(_AGAIN_S, self._again)

    def _again(self) -> None:
        held, self._held = self._held, []
        for connection in held:
            self._give(connection)
        if not self._held:
            self._listen()


def _same(info: ModelInfo, sent: ModelInfo | None) -> bool:
    """Whether nothing has changed but the memory, which fronts do not use."""
    return sent is not None and msgspec.structs.replace(info, memory=sent.memory) == sent
