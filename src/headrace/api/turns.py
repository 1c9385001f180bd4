"""Conversations of APIs whose parts are finer than turns."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.api.exchange import Call
from headrace.core.errors import Unsupported
from headrace.core.events import ToolCall
from headrace.core.media import Content, joined
from headrace.core.request import Message


class Turns:
    """Makes turns of the parts of a conversation, those of one answer becoming one turn."""

    def __init__(self) -> None:
        self._turns: list[Message] = []
        self._names: dict[str, str] = {}
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []

    def add(self, message: Message) -> None:
        """Add a turn that is not the model's; system messages at the beginning are joined."""
        self._end_answer()
        turns = self._turns
        systems = {"system", "developer"}
        if len(turns) == 1 and turns[0].role in systems and message.role in systems:
            # Many templates know one system message only.
            message = Message("system", joined(turns.pop().content, message.content))
        turns.append(message)

    def answer(self, call_id: str, output: Content) -> None:
        """Add what a tool has returned."""
        self.add(Message("tool", output, self._names.get(call_id), tool_call_id=call_id))

    def say(self, text: str) -> None:
        """Add text of the model."""
        self._texts.append(text)

    def think(self, text: str) -> None:
        """Add thinking of the model."""
        self._thoughts.append(text)

    def call(self, call: ToolCall) -> None:
        """Add a call of the model."""
        self._names[call.id] = call.name
        self._calls.append(call)

    def end(self) -> tuple[Message, ...]:
        """Return all turns."""
        self._end_answer()
        return tuple(self._turns)

    def _end_answer(self) -> None:
        text, thought, calls = "".join(self._texts), "".join(self._thoughts), tuple(self._calls)
        if self._texts or calls:
            message = Message("assistant", text, tool_calls=calls, reasoning=thought)
            self._turns.append(message)
        self._texts, self._thoughts, self._calls = [], [], []


def leave_out(call: Call, hosted: Sequence[str], *, kept: bool, forced: bool) -> None:
    """Note in `call` tools that a provider would run, and that are left out.

    `kept` is whether the model can do without: other tools are left, or none may be called.

    Raises:
        Unsupported: it cannot, or is `forced` to call a tool, which might be one of them.
    """
    if hosted and (forced or not kept):
        message = f"The tool {hosted[0][:64]} is not run by this server, and the request needs it."
        raise Unsupported(message, param="tools")
    call.left_out += tuple(dict.fromkeys(f"tool {name[:64]}" for name in hosted))
