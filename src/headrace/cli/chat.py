"""The chat of `headrace run`: a prompt, answers, and Ctrl-C that stops only the answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from headrace.cli import terminal
from headrace.cli.conversation import COMMANDS, Conversation, Leave, complaint
from headrace.cli.run import loaded, summary, written
from headrace.core.errors import ContextOverflow, HeadraceError

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.model_worker import AsyncModelWorker

_QUOTES = '"""'


async def chat(
    settings: Settings,
    spec: ModelSpec,
    *,
    system: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    figures: bool = True,
) -> None:
    """Load a model and talk with it until the user leaves."""
    conversation = Conversation(spec.name, system=system, sampling=sampling)
    async with loaded(settings, spec) as worker:
        session = prompt_session(settings.config.home / "chat_history")
        terminal.note(f"Chat with {spec.name}. /help lists the commands, Ctrl-D leaves.")
        with contextlib.suppress(Leave, EOFError):
            await _talk(session, worker, conversation, figures=figures)


async def _talk(
    session: PromptSession[str],
    worker: AsyncModelWorker,
    conversation: Conversation,
    *,
    figures: bool,
) -> None:
    interrupts = 0
    while True:
        try:
            text = unquoted(await session.prompt_async(">>> "))
        except KeyboardInterrupt:
            # A line that was begun is dropped; only an empty prompt counts towards leaving.
            interrupts = 0 if session.default_buffer.text else interrupts + 1
            if interrupts > 1:
                return
            terminal.note("Ctrl-C again or Ctrl-D leaves." if interrupts else "")
            continue
        interrupts = 0
        if text.strip() and _prepared(conversation, text):
            await _answer(worker, conversation, figures=figures)


def _prepared(conversation: Conversation, text: str) -> bool:
    """Take a line in; tell whether the model has to answer now."""
    if not text.startswith("/"):
        conversation.ask(text)
        return True
    try:
        told = conversation.command(text)
    except (HeadraceError, OSError, msgspec.MsgspecError) as error:
        told = complaint(error)
    if told is not None:
        terminal.note(terminal.printable(told))
    return told is None


async def _answer(worker: AsyncModelWorker, conversation: Conversation, *, figures: bool) -> None:
    parts: list[str] = []
    task = asyncio.ensure_future(written(worker, conversation.request(), parts))
    try:
        with _on_interrupt(task.cancel):
            await asyncio.wait({task})
    finally:
        task.cancel()
    conversation.answered("".join(parts))
    if task.cancelled():
        terminal.note("(stopped)")
        return
    error = task.exception()
    if isinstance(error, ContextOverflow):
        terminal.note(f"{complaint(error)} The question was not asked; /clear starts anew.")
    elif isinstance(error, HeadraceError):
        terminal.note(complaint(error))
    elif error is not None:
        raise error
    elif figures:
        terminal.note(f"({summary(task.result())})")


@contextlib.contextmanager
def _on_interrupt(action: Callable[[], object]) -> Generator[None]:
    """Let Ctrl-C do something else than to end the program."""
    before = signal.getsignal(signal.SIGINT)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, action)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


def prompt_session(history: Path) -> PromptSession[str]:
    """Return a prompt with history, completion of commands and several lines."""
    return PromptSession(
        history=_history(history),
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_bindings(),
        prompt_continuation="... ",
    )


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def unfinished(text: str) -> bool:
    r"""Tell whether Enter goes on with the text: an open `\"\"\"`, or a backslash at its end."""
    opened = text.lstrip().startswith(_QUOTES)
    closed = text.rstrip().endswith(_QUOTES) and len(text.strip()) >= 2 * len(_QUOTES)
    return text.endswith("\\") or (opened and not closed)


def unquoted(text: str) -> str:
    """Return what was meant: without the quotes around it and the backslashes at line ends."""
    bare = text.strip()
    if bare.startswith(_QUOTES) and bare.endswith(_QUOTES) and len(bare) >= 2 * len(_QUOTES):
        return bare[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return text.replace("\\\n", "\n")
