"""A chat without its terminal: what was said, how to answer, and the slash commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.paths import expanded
from headrace.core.request import Message
from headrace.core.sampling import Sampling

HELP = """\
/help                 these lines
/clear                forget the conversation; the system message stays
/system [TEXT]        set the message of the system; without text, drop it
/set [NAME VALUE]     set how tokens are chosen; without a value, back to the default;
                      several values stand between commas, or in JSON: ["\\n\\n"]
/show                 model, settings and messages
/save FILE            write the conversation as JSON
/load FILE            read one that was saved
/retry                answer the last question again
/bye                  leave
Alt-Enter, a backslash at the end of a line or \"\"\" around the text write several lines.
Ctrl-C stops an answer; twice at an empty prompt, or Ctrl-D, leaves."""

_KINDS = {field.name: field.type for field in msgspec.structs.fields(Sampling)}


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation as it is written to a file."""

    model: str
    messages: list[Message]
    system: str | None = None
    sampling: dict[str, Any] = {}


class Leave(Exception):
    """The user wants to go."""


class Conversation:
    """Messages that grow, turn by turn. `asked` is a question without an answer yet."""

    def __init__(
        self, model: str, *, system: str | None = None, sampling: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model
        self.system = system
        self.sampling = dict(sampling or {})
        self.messages: list[Message] = []

    def __repr__(self) -> str:
        return f"<Conversation {self.model} messages={len(self.messages)}>"

    def request(self) -> dict[str, Any]:
        """Return the arguments of the next answer."""
        system = [Message("system", self.system)] if self.system else []
        return {"messages": [*system, *self.messages], **self.sampling}

    def ask(self, text: str) -> None:
        """Add a question."""
        self.messages.append(Message("user", text))

    def answered(self, text: str) -> None:
        """Add the answer, whole or cut off; a question that got none is taken back."""
        if text:
            self.messages.append(Message("assistant", text))
        else:
            self.messages.pop()

    def command(self, line: str) -> str | None:
        """Do what a slash command says and return what to tell; None: answer again.

        Raises:
            InvalidRequest: no such command, or a wrong value.
            Leave: the user wants to go.
        """
        name, _, rest = line[1:].strip().partition(" ")
        action = _COMMANDS.get(name)
        if action is None:
            raise InvalidRequest(f"/{name} is no command. /help lists them.")
        return action(self, rest.strip())

    def clear(self, _: str) -> str:
        """Forget everything that was said."""
        self.messages.clear()
        return "The conversation is cleared."

    def set_system(self, text: str) -> str:
        """Replace the message of the system."""
        self.system = text or None
        return "The system message is set." if text else "There is no system message."

    def set_sampling(self, text: str) -> str:
        """Change how tokens are chosen."""
        name, _, value = text.partition(" ")
        if not name:
            return self._settings()
        if name not in _KINDS or name in ("logprobs", "logit_bias"):
            known = ", ".join(key for key in _KINDS if key not in ("logprobs", "logit_bias"))
            raise InvalidRequest(f"{name} cannot be set. Known: {known}.")
        if not value:
            self.sampling.pop(name, None)
            return f"{name} is back at its default."
        self.sampling[name] = _converted(_listed(name, value), _KINDS[name], name)
        return f"{name} is {self.sampling[name]}."

    def show(self, _: str) -> str:
        """Return model, settings and messages."""
        lines = [f"model: {self.model}", f"system: {self.system or '-'}", self._settings()]
        return "\n".join(lines + [f"{one.role}: {one.content}" for one in self.messages])

    def save(self, name: str) -> str:
        """Write the conversation to a file that only its owner can read."""
        path = _path(name)
        body = Saved(self.model, self.messages, self.system, self.sampling)
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(body)))
        return f"Saved {len(self.messages)} messages to {path}."

    def load(self, name: str) -> str:
        """Take over a conversation from a file, whichever model it was held with."""
        path = _path(name)
        saved = msgspec.json.decode(path.read_bytes(), type=Saved)
        sampling = {
            key: _converted(value, _KINDS.get(key, Any), key)
            for key, value in saved.sampling.items()
        }
        self.messages, self.system, self.sampling = saved.messages, saved.system, sampling
        return f"Loaded {len(self.messages)} messages from {path}."

    def retry(self, _: str) -> None:
        """Take the last answer back, so that it is given again."""
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
    if name not in ("stop", "stop_token_ids"):
        return value
    return msgspec.json.decode(value) if value.startswith("[") else value.split(",")


def _converted(value: object, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name}: {error}.", param=name) from error


_COMMANDS: dict[str, Callable[[Conversation, str], str | None]] = {
    "help": lambda conversation, rest: HELP,
    "?": lambda conversation, rest: HELP,
    "clear": Conversation.clear,
    "system": Conversation.set_system,
    "set": Conversation.set_sampling,
    "show": Conversation.show,
    "save": Conversation.save,
    "load": Conversation.load,
    "retry": Conversation.retry,
    "bye": _leave,
    "exit": _leave,
}
COMMANDS = tuple(f"/{name}" for name in _COMMANDS)


def complaint(error: Exception) -> str:
    """Return what went wrong, for one who goes on chatting."""
    text = error.message if isinstance(error, HeadraceError) else str(error)
    return f"error: {text}"
