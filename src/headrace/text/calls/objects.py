"""Parses calls that are objects of JSON with a name and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from headrace.text.calls.cursor import MAX_HEAD, Cursor, Need, NotACallError
from headrace.text.calls.format import Format
from headrace.text.calls.parts import Sink

_SCALAR = re.compile(r"[-+.\w]*")
_MEMBER_LIMIT = 32
_NAMES = frozenset({"name", "tool_name", "function"})
_ARGUMENTS = frozenset({"arguments", "parameters"})
_IDS = frozenset({"id", "tool_call_id"})
# What may come in an object that is a call without any marker, before its name.
_BARE_KEYS = frozenset({"type", "id"})

Tools = Mapping[str, Mapping[str, Any] | None]


class _Member:
    """What has been read of an object that is a call."""

    def __init__(self) -> None:
        self.depth = 1
        self.name: str | None = None
        self.id: str | None = None
        self.early: str | None = None
        self.strange = False
        self.done = False


class Objects:
    """Reads one object, or several, at the cursor; `_made` is whether a call has begun.

    With `only`, a call of another tool than `tools` is none.
    """

    def __init__(
        self, form: Format, tools: Tools, cursor: Cursor, sink: Sink, *, only: bool
    ) -> None:
        self._format = form
        self._tools = tools
        self._only = only
        self._cursor = cursor
        self._sink = sink
        self._made = False

    def _start(self, name: str, identity: str | None = None) -> None:
        if self._only and name not in self._tools:
            raise NotACallError
        self._made = True
        self._sink.start(name, identity)

    def _end(self) -> None:
        self._sink.end()
        self._cursor.record()

    def _objects(self, *, bare: bool) -> Need[None]:
        cursor = self._cursor
        in_list = yield from cursor.accept("[")
        while True:
            yield from self._object(bare=bare)
            separator = yield from cursor.accept(",", ";")
            if not (yield from cursor.ahead("{")):
                break
        if in_list:
            yield from cursor.accept("]")
        elif separator:
            raise NotACallError

    def _object(self, *, bare: bool) -> Need[None]:
        cursor, member = self._cursor, _Member()
        yield from cursor.expect("{")
        for _ in range(_MEMBER_LIMIT):
            if (yield from cursor.accept("}")):
                member.depth -= 1
            elif member.done and not (yield from cursor.ahead('"')):
                return
            else:
                yield from self._member(member, bare=bare)
            if not member.depth:
                break
            yield from cursor.accept(",")
        if not member.done:
            self._without_arguments(member, bare=bare)

    def _without_arguments(self, member: _Member, *, bare: bool) -> None:
        # A member with another name may be the arguments, which would be lost.
        strange = member.strange and member.early is None
        if not member.name or member.depth or strange or (bare and not self._plausible(member)):
            raise NotACallError
        self._start(member.name, member.id)
        self._sink.arguments(_unwrapped(member.early or "{}"))
        self._end()

    def _plausible(self, member: _Member) -> bool:
        return member.early is not None or member.name in self._tools

    def _member(self, member: _Member, *, bare: bool) -> Need[None]:
        cursor, form = self._cursor, self._format
        key = yield from self._text()
        yield from cursor.expect(":")
        text = yield from cursor.ahead('"')
        if member.done:
            yield from self._any()
        elif text and (key in _NAMES or key == form.name_key):
            member.name = yield from self._text()
        elif key == "function" and (yield from cursor.accept("{")):
            member.depth += 1
        elif key in _ARGUMENTS or key == form.arguments_key:
            yield from self._member_arguments(member, bare=bare)
        elif bare and key not in _BARE_KEYS:
            raise NotACallError
        elif text and (key in _IDS or key == form.id_key):
            member.id = yield from self._text()
        else:
            member.strange = member.strange or key not in _BARE_KEYS
            yield from self._any()

    def _member_arguments(self, member: _Member, *, bare: bool) -> Need[None]:
        if bare and not (yield from self._cursor.ahead("{")):
            raise NotACallError
        if not member.name:
            member.early = yield from self._any()
            return
        yield from self._cursor.spaces()
        self._start(member.name, member.id)
        if (yield from self._cursor.ahead("{", "[")):
            yield from self._cursor.json(self._sink.arguments)
        else:
            self._sink.arguments(_unwrapped((yield from self._any(limit=None))))
        member.done = True
        self._end()

    def _text(self) -> Need[str]:
        if not (yield from self._cursor.ahead('"')):
            raise NotACallError
        raw = yield from self._any()
        try:
            return str(json.loads(raw, strict=False))
        except ValueError as error:
            raise NotACallError from error

    def _any(self, limit: int | None = MAX_HEAD) -> Need[str]:
        """Consume a value of JSON and return it."""
        yield from self._cursor.spaces()
        if not (yield from self._cursor.ahead('"', "{", "[")):
            word = yield from self._cursor.run(_SCALAR, 4096)
            if not word:
                raise NotACallError
            return word
        texts: list[str] = []
        yield from self._cursor.json(texts.append, limit)
        return "".join(texts)


def _unwrapped(arguments: str) -> str:
    """Return arguments that may have been written as a string, or null."""
    if arguments == "null":
        return "{}"
    if arguments.startswith('"'):
        try:
            inner: object = json.loads(arguments, strict=False)
        except ValueError:
            return arguments
        if isinstance(inner, str) and inner.strip().startswith("{"):
            return inner.strip()
    return arguments
