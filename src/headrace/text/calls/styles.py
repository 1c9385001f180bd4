"""One parser for each style of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping

from headrace.text.calls.cursor import Cursor, Emit, Markers, Need, NotACallError
from headrace.text.calls.format import Format
from headrace.text.calls.objects import Objects, Tools
from headrace.text.calls.parts import Reading, Sink
from headrace.text.calls.values import Literals, TypedValue, kind_of

_NAME = re.compile(r"[^\s<>{}\[\]()\"'`=,|｜]*")
_WORD = re.compile(r"[\w.\-]*")
_QUOTED = re.compile(r"[^<>\"\n]*")
_NO_TAG = re.compile(r"[^<>\n]*")


class Calls(Objects):
    """Parses calls at the cursor into the sink."""

    def __init__(
        self, form: Format, tools: Tools, cursor: Cursor, sink: Sink, *, reading: Reading
    ) -> None:
        super().__init__(form, tools, cursor, sink, only=reading.only)
        self._reading = reading
        self._closers = _pieces(form.call_close)
        self._section = (form.section_open.strip(), form.section_close.strip())
        self._open = form.call_open.strip()
        self.openers = tuple(
            opener for opener in (self._section[0], self._open, *form.also) if opener
        )
        self._name_end = ending(form.call_open, form.name_end)
        self._key_end = ending(form.key_open, form.key_end)
        self._parsers: Mapping[str, Callable[[], Need[None]]] = {
            "json": self._json,
            "generic": self._json,
            "named": self._named,
            "tagged": self._tagged,
            "python": self._python,
            "gemma": self._gemma,
            "recipient": self._recipient,
        }
        self._value_ends = self._value_markers()

    @property
    def bare(self) -> str:
        """What an answer begins with that is a call without a marker."""
        if self._open or self._section[0]:
            return ""
        return {"json": "{", "python": "["}.get(self._format.style, "")

    def attempt(self, emit: Emit) -> Need[bool]:
        """Parse the calls that begin here; whether there is any.

        What is no call is emitted as it is.
        """
        self._cursor.record()
        self._made = False
        try:
            yield from self._parsers[self._format.style]()
        except NotACallError:
            if self._sink.open:
                self._cursor.rest()
                self._sink.cut(self._cursor.recorded())
            else:
                emit(self._cursor.recorded())
        self._cursor.recorded()
        return self._made

    # Objects of JSON.

    def _json(self) -> Need[None]:
        cursor = self._cursor
        opener = yield from cursor.accept(*self.openers)
        if opener and (yield from self._is_python()):
            yield from self._python_calls()
        else:
            yield from self._objects(bare=not opener)
        yield from self._close()

    def _is_python(self) -> Need[bool]:
        # Llama's own tools: name.call(key="value").
        if not self._format.also:
            return False
        return not (yield from self._cursor.ahead("{", "["))

    def _close(self) -> Need[None]:
        for closer in self._closers:
            yield from self._cursor.accept(closer)

    # A name, then JSON.

    def _named(self) -> Need[None]:
        cursor = self._cursor
        opener = yield from cursor.accept(*self.openers)
        while opener:
            if opener == self._section[0]:
                yield from cursor.expect(self._open)
            if (yield from cursor.ahead("[", "{")):
                yield from self._objects(bare=False)
            else:
                yield from self._named_call()
            yield from self._close()
            opener = yield from cursor.accept(self._open) if self._section[0] else _nothing()
        yield from cursor.accept(self._section[1])

    def _named_call(self) -> Need[None]:
        name, identity = yield from self._name()
        if self._format.id_open and (yield from self._cursor.accept(self._format.id_open)):
            identity = yield from self._word()
        if not (yield from self._cursor.accept(self._name_end)):
            yield from self._expect_ahead("{")
        yield from self._json_arguments(name, identity, *self._closers)

    def _name(self) -> Need[tuple[str, str | None]]:
        text = yield from self._word()
        if self._format.ids != "name":
            return text, None
        name = text.removeprefix("functions.").rpartition(":")[0] or text
        if name == text and text.startswith(":"):
            name = next(iter(self._tools)) if len(self._tools) == 1 else ""
        if not name:
            raise NotACallError
        return name, text

    def _word(self) -> Need[str]:
        yield from self._cursor.spaces()
        word = yield from self._cursor.run(_NAME, 256)
        if not word:
            raise NotACallError
        return word

    def _expect_ahead(self, *literals: str) -> Need[str]:
        match = yield from self._cursor.ahead(*literals)
        if not match:
            raise NotACallError
        return match

    def _json_arguments(self, name: str, identity: str | None, *ends: str) -> Need[None]:
        """Consume an object of JSON; where an end comes at once there are no arguments."""
        if (yield from self._expect_ahead("{", *ends)) == "{":
            yield from self._cursor.spaces()
            self._start(name, identity)
            yield from self._cursor.json(self._sink.arguments)
        else:
            self._start(name, identity)
            self._sink.arguments("{}")
        self._end()

    def _recipient(self) -> Need[None]:
        cursor = self._cursor
        yield from cursor.accept(self._open)
        name = yield from cursor.run(_WORD, 256)
        if not name or (yield from cursor.take(1)) != "\n":
            raise NotACallError
        if name == "all":
            cursor.record()
            return
        if not self._reading.calls:
            raise NotACallError
        yield from self._json_arguments(name, None)

    # Arguments in tags.

    def _tagged(self) -> Need[None]:
        cursor, section = self._cursor, self._section[0]
        opener = yield from cursor.accept(*self.openers)
        while opener:
            if opener == section:
                yield from cursor.expect(self._open)
            if (yield from cursor.ahead("{")):
                yield from self._objects(bare=False)
                yield from self._close()
            else:
                yield from self._tagged_call()
            opener = yield from cursor.accept(self._open) if section else _nothing()
        yield from cursor.accept(self._section[1])

    def _tagged_call(self) -> Need[None]:
        cursor, form = self._cursor, self._format
        name, attributes = yield from self._header(form.call_open, self._name_end, self._word())
        ends = (form.key_open.strip(), *self._closers[:1])
        empty = attributes.endswith("/")
        if not self._name_end:
            yield from self._expect_ahead(*ends)
        self._start(name)
        comma = "{"
        while not empty and (yield from cursor.expect(*ends)) == ends[0]:
            comma = yield from self._argument(name, comma)
        self._sink.arguments("{}" if comma == "{" else "}")
        self._end()
        for closer in self._closers[1:]:
            yield from cursor.accept(closer)

    def _header(self, opener: str, end: str, word: Need[str]) -> Need[tuple[str, str]]:
        """Consume a name, perhaps attributes, and `end`."""
        cursor = self._cursor
        quoted = opener.rstrip().endswith('"')
        name = (yield from word).rstrip("/")
        attributes = ""
        if quoted:
            yield from cursor.expect('"')
            attributes = yield from cursor.run(_NO_TAG, 256)
        if end:
            yield from cursor.expect(end)
        return name, attributes

    def _argument(self, name: str, comma: str) -> Need[str]:
        form, cursor = self._format, self._cursor
        key, attributes = yield from self._key()
        self._sink.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")
        kind = kind_of(self._tools.get(name), key)
        if form.typed and form.typed in attributes:
            text = f'{form.typed}="string"', f'{form.typed}="true"'
            kind = "string" if any(mark in attributes for mark in text) else "structured"
        value = TypedValue(kind, self._sink.arguments)
        yield from self._value(value)
        value.finish()
        yield from cursor.accept(form.value_close.strip())
        return ", "

    def _key(self) -> Need[tuple[str, str]]:
        form, cursor = self._format, self._cursor
        end = self._key_end
        if form.key_open.rstrip().endswith('"'):
            word = cursor.run(_QUOTED, 256)
            key, attributes = yield from self._header(form.key_open, end, word)
        else:
            yield from cursor.spaces()
            key, attributes = (yield from cursor.run(_NO_TAG, 256)).strip(), ""
            yield from cursor.expect(end)
        if form.value_open:
            yield from cursor.expect(form.value_open.strip())
        return key, attributes

    def _value_markers(self) -> Markers:
        form = self._format
        ends = [form.value_close.strip()]
        if self._reading.exact:
            return Markers(["\n" * form.framed + ends[0]])
        if form.framed:  # a model may forget the end of a value, then a line begins with the next
            ends = ["\n" + end for end in (*ends, form.key_open.strip(), *self._closers[:1])] + ends
        return Markers(ends)

    def _value(self, value: TypedValue) -> Need[None]:
        """Consume text up to the end of the value: the end marker, if what follows fits."""
        cursor, form = self._cursor, self._format
        if form.framed and (yield from cursor.starts("\n")):
            cursor.skip(1)
        close = form.value_close.strip()
        while True:
            marker = yield from cursor.find(self._value_ends, value.feed)
            if not marker:
                raise NotACallError
            if not value.in_string and (yield from self._value_ends_at(marker, close)):
                cursor.skip(len(marker) - len(marker.lstrip("\n")))
                return
            value.feed(cursor.skip(1))

    def _value_ends_at(self, marker: str, close: str) -> Need[bool]:
        cursor, size = self._cursor, len(marker)
        if self._reading.exact:
            return True
        key_open, closer = self._format.key_open.strip(), self._closers[0]
        if marker.lstrip("\n") == key_open:
            return True
        follows = [key_open, closer] if marker.lstrip("\n") == close else [*self._after_call()]
        if (yield from cursor.ahead(*follows, after=size)):
            return True
        return (yield from cursor.ends(after=size))

    def _after_call(self) -> Collection[str]:
        return [mark for mark in (*self._closers[1:], self._section[1], self._open) if mark]

    # Python and Gemma's notation.

    def _python(self) -> Need[None]:
        yield from self._cursor.accept(*self.openers)
        yield from self._python_calls()
        yield from self._close()

    def _python_calls(self) -> Need[None]:
        cursor = self._cursor
        in_list = yield from cursor.accept("[")
        while True:
            yield from self._python_call()
            separator = yield from cursor.accept(",", ";")
            if not separator or (yield from cursor.ahead("]")):
                break
        if in_list:
            yield from cursor.accept("]")

    def _python_call(self) -> Need[None]:
        cursor = self._cursor
        yield from cursor.spaces()
        name = yield from cursor.run(_WORD, 256)
        yield from cursor.expect("(")
        literals = Literals(cursor, self._sink.arguments)
        empty = yield from cursor.accept(")")
        key = "" if empty else (yield from literals.key("="))
        self._start(name.removesuffix(".call") if self._format.also else name)
        yield from self._literal_arguments(literals, key, "=", ")")

    def _literal_arguments(self, literals: Literals, key: str, equal: str, end: str) -> Need[None]:
        """Consume `key=value` pairs after the first key up to `end`."""
        sink, comma = self._sink, "{"
        while key:
            sink.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")
            yield from literals.value()
            comma = ", "
            closed = (yield from self._cursor.expect(",", end)) == end
            closed = closed or bool((yield from self._cursor.accept(end)))
            key = "" if closed else (yield from literals.key(equal))
        sink.arguments("{}" if comma == "{" else "}")
        self._end()

    def _gemma(self) -> Need[None]:
        cursor = self._cursor
        yield from cursor.expect(self._open)
        name = yield from self._word()
        yield from cursor.expect("{")
        literals = Literals(cursor, self._sink.arguments, self._format.quote)
        empty = yield from cursor.accept("}")
        key = "" if empty else (yield from literals.key(":"))
        self._start(name.removeprefix("call:"))
        yield from self._literal_arguments(literals, key, ":", "}")
        yield from self._close()


def _nothing() -> Need[str]:
    yield from ()
    return ""


def ending(opener: str, end: str) -> str:
    """Return the end of a header without the quote and the attributes before it."""
    end = end.strip()
    return end.rpartition('"')[2] if opener.rstrip().endswith('"') else end


def _pieces(closing: str) -> tuple[str, ...]:
    """Split the end of a call at white space and after the end of a code block."""
    return tuple(re.findall(r"```|\S+?(?=```)|\S+(?: \S+)*", closing)) or ("",)
