"""The chat of `headrace run`: the conversation with its slash commands, and the prompt."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.keys import Keys

from headrace.cli import terminal
from headrace.core.errors import ContextOverflow, HeadraceError, InvalidRequest
from headrace.core.private import private_folder
from headrace.core.request import Message
from headrace.core.sampling import Sampling
from headrace.core.values import expanded

HELP = """\
/help                 these lines
/clear                forget the conversation; the system message stays
/system [TEXT]        set the system message; without text, drop it
/set [NAME VALUE]     set how tokens are chosen; without a value, back to the default;
                      separate several values by commas, or write JSON: ["\\n\\n"]
/think [on|off|...]   switch thinking, or say how much: low, medium, high; without a value,
                      back to the model's own
/show                 model, settings and messages
/save FILE            write the conversation as JSON
/load FILE            read one that was saved
/retry                answer the last question again
/bye                  leave
Alt-Enter, a backslash at the end of a line or \"\"\" around the text write several lines.
Ctrl-C stops an answer; twice at an empty prompt, or Ctrl-D, leaves. What is typed during an
answer waits at the next prompt."""

_THINKING = ("on", "off", "minimal", "low", "medium", "high")
_QUOTES = '"""'
_LISTS = ("stop", "stop_token_ids")
_SETTABLE = {
    field.name: field.type
    for field in msgspec.structs.fields(Sampling)
    if field.name not in ("logprobs", "logit_bias")
}


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation as it is written to a file."""

    model: str
    messages: list[Message]
    system: str | None = None
    sampling: dict[str, Any] = {}


class Leave(Exception):
    """The user wants to leave the chat."""


class Conversation:
    """The messages of a chat, and how the next answer is sampled."""

    def __init__(
        self,
        model: str,
        *,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        thinking: str | None = None,
    ) -> None:
        self.model = model
        self.thinking = thinking
        self.system = system
        self.sampling = dict(sampling or {})
        self.messages: list[Message] = []

    def __repr__(self) -> str:
        return f"<Conversation {self.model} messages={len(self.messages)}>"

    def request(self) -> dict[str, Any]:
        """Return the arguments for the next answer."""
        system = [Message("system", self.system)] if self.system else []
        thinking = {"thinking": self.thinking} if self.thinking else {}
        return {"messages": [*system, *self.messages], **self.sampling, **thinking}

    def ask(self, text: str) -> None:
        """Add a question."""
        self.messages.append(Message("user", text))

    def answered(self, text: str) -> None:
        """Add the answer, complete or not; if it is empty, remove the question."""
        if text:
            self.messages.append(Message("assistant", text))
        else:
            self.messages.pop()

    def command(self, line: str) -> str | None:
        """Run a slash command and return its output; None means to answer again.

        Raises:
            InvalidRequest: no such command, or a wrong value.
            Leave: the user wants to leave.
        """
        name, _, rest = line[1:].strip().partition(" ")
        action = _COMMANDS.get(name)
        if action is None:
            raise InvalidRequest(f"/{name} is no command. /help lists them.")
        return action(self, rest.strip())

    def clear(self, _: str) -> str:
        """Forget all messages."""
        self.messages.clear()
        return "The conversation is cleared."

    def set_system(self, text: str) -> str:
        """Replace the system message."""
        self.system = text or None
        return "The system message is set." if text else "There is no system message."

    def set_thinking(self, text: str) -> str:
        """Switch thinking, or leave it to the model."""
        if text not in ("", *_THINKING):
            raise InvalidRequest(f"/think takes {', '.join(_THINKING)}.")
        self.thinking = text or None
        return f"Thinking is {text or 'as the model has it'}."

    def set_sampling(self, text: str) -> str:
        """Set a sampling parameter, or show them."""
        name, _, value = text.partition(" ")
        if not name:
            return self._settings()
        if name not in _SETTABLE:
            raise InvalidRequest(f"{name} cannot be set. Known: {', '.join(_SETTABLE)}.")
        if not value:
            self.sampling.pop(name, None)
            return f"{name} is back at its default."
        self.sampling[name] = _converted(name, _listed(name, value))
        return f"{name} is {self.sampling[name]}."

    def show(self, _: str) -> str:
        """Return model, settings and messages."""
        lines = [f"model: {self.model}", f"system: {self.system or '-'}", self._settings()]
        return "\n".join(lines + [f"{turn.role}: {turn.content}" for turn in self.messages])

    def save(self, name: str) -> str:
        """Write the conversation to a file that only its owner can read."""
        path = _path(name)
        body = Saved(self.model, self.messages, self.system, self.sampling)
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(body)))
        return f"Saved {len(self.messages)} messages to {path}."

    def load(self, name: str) -> str:
        """Continue a conversation from a file, with any model."""
        path = _path(name)
        saved = msgspec.json.decode(path.read_bytes(), type=Saved)
        sampling = {key: _converted(key, value) for key, value in saved.sampling.items()}
        self.messages, self.system, self.sampling = saved.messages, saved.system, sampling
        return f"Loaded {len(self.messages)} messages from {path}."

    def retry(self, _: str) -> None:
        """Drop the last answer, so that it is generated again."""
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages:
            raise InvalidRequest("There is no question to answer again.")

    def _settings(self) -> str:
        pairs = [f"{name}={value}" for name, value in self.sampling.items()]
        return f"sampling: {' '.join(pairs) or 'the defaults of the engine'}"


def _leave(*_: object) -> str:
    raise Leave


def _path(name: str) -> Path:
    if not name:
        raise InvalidRequest("Name a file.")
    return expanded(name)


def _listed(name: str, value: str) -> Any:
    if name not in _LISTS:
        return value
    return msgspec.json.decode(value) if value.startswith("[") else value.split(",")


def _converted(name: str, value: object) -> Any:
    """Return a parameter as its own type, within its range."""
    try:
        converted = msgspec.convert(value, _SETTABLE.get(name, Any), strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name}: {error}.", param=name) from error
    if name in _SETTABLE:
        Sampling(**{name: converted})
    return converted


_COMMANDS: dict[str, Callable[[Conversation, str], str | None]] = {
    "help": lambda conversation, rest: HELP,
    "?": lambda conversation, rest: HELP,
    "clear": Conversation.clear,
    "system": Conversation.set_system,
    "set": Conversation.set_sampling,
    "think": Conversation.set_thinking,
    "show": Conversation.show,
    "save": Conversation.save,
    "load": Conversation.load,
    "retry": Conversation.retry,
    "bye": _leave,
    "exit": _leave,
}
COMMANDS = tuple(f"/{name}" for name in _COMMANDS)


Answer = Callable[[list[str]], Awaitable[str]]
"""Writes the next answer, appends its text to a list piece by piece, and returns its figures."""


class Chat:
    """A conversation at the prompt."""

    def __init__(
        self, conversation: Conversation, answer: Answer, history: Path, *, figures: bool
    ) -> None:
        self._conversation = conversation
        self._answer = answer
        self._figures = figures
        self._session = _prompt_session(history)
        self._typed = ""

    async def run(self) -> None:
        """Read questions and commands, and answer them, until the user leaves."""
        terminal.note(
            f"Chat with {self._conversation.model}. /help lists the commands, Ctrl-D leaves."
        )
        interrupts = 0
        with contextlib.suppress(Leave, EOFError):
            while interrupts < 2:
                try:
                    typed, self._typed = self._typed.rstrip("\n"), ""
                    text = unquoted(await self._session.prompt_async(">>> ", default=typed))
                except KeyboardInterrupt:
                    # Drops a line that was begun; only at an empty prompt it counts as leaving.
                    interrupts = 0 if self._session.default_buffer.text else interrupts + 1
                    if interrupts < 2:
                        terminal.note("Ctrl-C again or Ctrl-D leaves." if interrupts else "")
                    continue
                interrupts = 0
                if text.strip() and self._needs_answer(text):
                    await self._reply()

    def _needs_answer(self, text: str) -> bool:
        """Process a line of input; return whether the model has to answer now."""
        if not text.startswith("/"):
            self._conversation.ask(text)
            return True
        try:
            output = self._conversation.command(text)
        except (HeadraceError, OSError, msgspec.MsgspecError) as error:
            output = _error_line(error)
        if output is not None:
            terminal.note(terminal.printable(output))
        return output is None

    async def _reply(self) -> None:
        parts: list[str] = []
        task = asyncio.ensure_future(self._answer(parts))
        try:
            with _on_interrupt(task.cancel), self._typing(task.cancel):
                await asyncio.wait({task})
        finally:
            task.cancel()
        self._conversation.answered("".join(parts))
        if task.cancelled():
            terminal.note("(stopped)")
            return
        error = task.exception()
        if isinstance(error, ContextOverflow):
            terminal.note(
                f"{_error_line(error)} The question was not sent; /clear starts a new conversation."
            )
        elif isinstance(error, HeadraceError):
            terminal.note(_error_line(error))
        elif error is not None:
            raise error
        elif self._figures:
            terminal.note(f"({task.result()})")

    @contextlib.contextmanager
    def _typing(self, stop: Callable[[], object]) -> Generator[None]:
        """Keep what is typed or pasted for the next prompt, unseen; Ctrl-C calls `stop`."""
        keys = self._session.input

        def read() -> None:
            for press in keys.read_keys():
                if press.key == Keys.ControlC:
                    stop()
                else:
                    self._typed = typed(self._typed, press)

        with keys.raw_mode(), keys.attach(read):
            yield


def typed(text: str, press: KeyPress) -> str:
    """Return a text after a key was pressed; those that move or command leave it as it is."""
    if press.key in (Keys.ControlM, Keys.ControlJ):
        return f"{text}\n"
    if press.key == Keys.ControlH:
        return text[:-1]
    is_text = press.key == Keys.BracketedPaste or not isinstance(press.key, Keys)
    return text + press.data.replace("\r\n", "\n").replace("\r", "\n") if is_text else text


def _error_line(error: Exception) -> str:
    return f"error: {error.message if isinstance(error, HeadraceError) else error}"


@contextlib.contextmanager
def _on_interrupt(action: Callable[[], object]) -> Generator[None]:
    """Call `action` on Ctrl-C instead of ending the program."""
    before = signal.getsignal(signal.SIGINT)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, action)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


def _prompt_session(history: Path) -> PromptSession[str]:
    """Return a prompt with history, completion of commands and multi-line input."""
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
        private_folder(path.parent)
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
    r"""Whether Enter continues the text: after an open `\"\"\"`, or a backslash at its end."""
    opened = text.lstrip().startswith(_QUOTES)
    closed = text.rstrip().endswith(_QUOTES) and len(text.strip()) >= 2 * len(_QUOTES)
    return text.endswith("\\") or (opened and not closed)


def unquoted(text: str) -> str:
    """Return input without the quotes around it and the backslashes at line ends."""
    bare = text.strip()
    if bare.startswith(_QUOTES) and bare.endswith(_QUOTES) and len(bare) >= 2 * len(_QUOTES):
        return bare[len(_QUOTES) : -len(_QUOTES)].strip("\n")
    return text.replace("\\\n", "\n")
