"""`headrace top`: what a running service does, as it does it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from headrace.cli import terminal
from headrace.cli.common import Common
from headrace.cli.ps import Url, span
from headrace.core.duration import seconds
from headrace.core.errors import ConfigError, HeadraceError, Unsupported, UpstreamError
from headrace.core.record import Activity
from headrace.core.status import PoolStatus

if TYPE_CHECKING:
    from headrace.cli.client import Client

Sort = Literal["slowest", "model"]

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0
_PATIENCE_S = 5.0
_PIPE_WIDTH = 160
_TERMINATED = 128 + signal.SIGTERM


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """A service at one time (Unix seconds, of this machine), or why there is none.

    `activity` is None where the service does not observe its requests.
    """

    time: float
    status: PoolStatus | None = None
    activity: Activity | None = None
    error: str | None = None


def top(
    common: Common,
    interval: Annotated[str, typer.Option(metavar="TIME", help="How often to look.")] = "1s",
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    sort: Annotated[Sort, typer.Option(help="Which running requests come first.")] = "slowest",
    url: Url = None,
) -> None:
    """Show live what a running service does: models, speeds, memory, the slowest requests.

    `q` ends it. Into a pipe it prints one frame; with --json, one document each time.
    """
    from headrace.cli.client import Client, address

    every = _interval(interval)

    async def show() -> int:
        async with Client(address(common.settings(), url)) as client:
            watch = _Watch(client, every)
            if not once and common.as_json:
                return await _print_each(watch, every)
            await watch.look()
            if common.as_json:
                terminal.print_json(watch.sight)
            elif once or not sys.stdout.isatty() or os.environ.get("TERM") in (None, "", "dumb"):
                _print(watch, sort)
            else:
                return await _live(watch, sort)
            return 0

    if code := asyncio.run(show()):
        raise typer.Exit(code)


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        if _SHORTEST_S <= (every := seconds(text)) <= _LONGEST_S:
            return every
    raise ConfigError(f"{text!r} is no time from 100ms to 1h.", param="interval")


class _Watch:
    """What was seen of a service last, and when."""

    def __init__(self, client: Client, every: float) -> None:
        self.url = client.url
        self.sight = Sight(time=time.time())
        self._client = client
        self._every = every
        self._answered = time.monotonic()
        self._error = ""

    async def look(self) -> None:
        """Look once.

        Raises:
            HeadraceError: there was no answer, or a refusal.
        """
        try:
            async with asyncio.timeout(_PATIENCE_S):
                status, activity = await self._client.status(), await self._activity()
        except TimeoutError:
            raise UpstreamError(f"The service at {self.url} does not answer.") from None
        self.sight = Sight(time=time.time(), status=status, activity=activity)
        self._answered, self._error = time.monotonic(), ""

    async def follow(self, seen: Callable[[], object]) -> None:
        """Look again and again, whatever happens to the service; tell `seen` each time."""
        while True:
            await asyncio.sleep(self._every)
            try:
                await self.look()
            except HeadraceError as error:
                self._error = error.message
            seen()

    def now(self) -> Sight:
        """Return what was seen last, as it is to be shown now."""
        silent = time.monotonic() - self._answered
        if not self._error and silent < 2 * self._every + 1:
            return self.sight
        told = f"no answer since {span(silent)}, trying again. {self._error}"
        return msgspec.structs.replace(self.sight, error=told)

    async def _activity(self) -> Activity | None:
        try:
            return await self._client.activity()
        except Unsupported:
            return None


async def _print_each(watch: _Watch, every: float) -> int:
    """Print one JSON document in a line each time; it ends with Ctrl-C or with its reader."""
    await watch.look()
    while True:
        print(msgspec.json.encode(watch.sight).decode(), flush=True)
        await asyncio.sleep(every)
        try:
            await watch.look()
        except HeadraceError as error:
            watch.sight = Sight(time=time.time(), error=error.message)


def _print(watch: _Watch, sort: Sort) -> None:
    from headrace.cli.frame import lines

    width = shutil.get_terminal_size((_PIPE_WIDTH, 0)).columns
    for line in lines(watch.sight, watch.url, width, sort=sort):
        print(line.plain.rstrip())


async def _live(watch: _Watch, sort: Sort) -> int:
    """Show it in place until somebody ends it; the terminal is as before on every way out."""
    from rich.console import Console, Group
    from rich.live import Live

    from headrace.cli.frame import lines

    console = Console(no_color=bool(os.environ.get("HEADRACE_NO_COLOR")) or None, highlight=False)
    changed = asyncio.Event()
    ended = asyncio.get_running_loop().create_future()

    def end(code: int) -> None:
        if not ended.done():
            ended.set_result(code)
        changed.set()

    def drawn() -> Group:
        size = console.size
        return Group(*lines(watch.now(), watch.url, size.width, size.height, sort=sort))

    with ExitStack() as before:
        before.enter_context(_signals(end, changed.set))
        before.enter_context(_keys(lambda: end(0)))
        live = Live(drawn(), console=console, screen=True, auto_refresh=False)
        before.enter_context(live)
        following = asyncio.ensure_future(watch.follow(changed.set))
        before.callback(following.cancel)
        while not ended.done():
            live.update(drawn(), refresh=True)
            changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 1.0)
            if following.done():
                following.result()
    return ended.result()


@contextlib.contextmanager
def _signals(end: Callable[[int], None], resized: Callable[[], None]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, end, 0)
    loop.add_signal_handler(signal.SIGTERM, end, _TERMINATED)
    loop.add_signal_handler(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGWINCH):
            loop.remove_signal_handler(one)


@contextlib.contextmanager
def _keys(end: Callable[[], None]) -> Generator[None]:
    """Call `end` when somebody presses q or Ctrl-C, or has gone with the terminal."""
    if not sys.stdin.isatty():
        yield
        return
    from prompt_toolkit.input import create_input
    from prompt_toolkit.keys import Keys

    keys = create_input()

    def pressed() -> None:
        found = {press.key for press in keys.read_keys()}
        if keys.closed or found & {"q", "Q", Keys.ControlC, Keys.ControlD}:
            end()

    with keys.raw_mode(), keys.attach(pressed):
        yield
