"""The sandbox of chat templates, which come with models and may be hostile.

In addition to Jinja's own sandbox, time and size are bounded. Only loops and calls can take long,
so the generated code checks the clock in both. Only joining and repeating can build long texts, so
their results are measured beforehand.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar, cast

from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.filters import do_indent
from jinja2.nodes import Concat, Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 8 * 1024 * 1024
_MAX_TOTAL = 32 * MAX_CHARACTERS
_MAX_BITS = 4096
_MAX_INDENT = 64
_ELEMENT = 64  # an element of a list, in characters
_WIDE_FIELD = re.compile(r"\d{4}|\{[^{}]*:[^{}]*\{")
# They repeat or pad by a number, or their results cannot be measured beforehand; no chat template
# uses them.
_DROPPED_FILTERS = ("batch", "center", "format", "sum", "urlize", "wordwrap", "xmlattr")
_DROPPED_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})

T = TypeVar("T")


class LimitExceeded(SecurityError):
    """The template exceeds its limit of time or size."""


class Refusal(TemplateError):
    """Raised by the template itself, with `raise_exception`: it refuses the conversation."""


class _Meter(threading.local):
    """The remaining limits of this thread's rendering: its deadline, and characters."""

    end: float = math.inf
    left: int = _MAX_TOTAL


_meter = _Meter()


def within(seconds: float, work: Callable[[], T]) -> T:
    """Call `work`, which compiles or renders in this thread.

    Raises:
        LimitExceeded: it takes longer than `seconds`, or its text is too long.
    """
    _meter.end, _meter.left = time.monotonic() + seconds, _MAX_TOTAL
    try:
        return work()
    finally:
        _meter.end, _meter.left = math.inf, _MAX_TOTAL


def _tick() -> None:
    if time.monotonic() > _meter.end:
        raise LimitExceeded("it took too long")


def _charge(size: int) -> None:
    _meter.left -= size
    if size > MAX_CHARACTERS or _meter.left < 0:
        raise LimitExceeded("it made too much text")


def _join(parts: Iterable[Any], separator: str = "") -> str:
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(str(part))
        size += len(kept[-1]) + len(separator)
        if size > MAX_CHARACTERS:
            break
    _charge(size)
    return separator.join(kept)


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _charge(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    margin = width if isinstance(width, int) else len(width)
    _charge(len(text) + margin * (len(text.splitlines()) + 1))
    return do_indent(text, width, first, blank)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As in transformers: a prompt is not HTML, so nothing is escaped.
    if indent is not None and indent > _MAX_INDENT:
        raise LimitExceeded("it indents too far")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _size(value: object) -> int:
    """Return the length of a text; for a list, about that of a text of equal memory."""
    if isinstance(value, str):
        return len(value)
    return _ELEMENT * len(value) if isinstance(value, list | tuple) else 0  # pyright: ignore[reportUnknownArgumentType]


def _add(left: Any, right: Any) -> Any:
    _charge(_size(left) + _size(right))
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int):
        left, right = right, left
    if isinstance(right, int):
        _charge(_size(left) * max(right, 0))
        if isinstance(left, int):
            _check_number(left.bit_length() + right.bit_length())
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() * abs(right))
    return left**right


def _check_number(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitExceeded("it made too large a number")


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        raise LimitExceeded("it formats text with %")
    return left % right


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(str(message))


class _GenerationTag(Extension):
    """`{% generation %}` marks the model's turns for training; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Adds a check of the clock to each block, bodies of loops included."""

    def blockvisit(self, nodes: Iterable[Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja configured as in transformers, with limits of time and size."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join)
    tick = staticmethod(_tick)

    def __init__(self) -> None:
        extensions = (_GenerationTag, "jinja2.ext.loopcontrols")
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _remainder}
        filters = cast("dict[str, Any]", self.filters)
        for name in _DROPPED_FILTERS:
            del filters[name]
        filters |= {"tojson": _tojson, "join": self._join_filter}
        filters |= {"replace": _replace, "indent": _indent}
        names = cast("dict[str, Any]", self.globals)
        del names["lipsum"]
        names |= {"raise_exception": _raise_exception, "strftime_now": time.strftime}

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call from a template: macros check the clock, methods of text their size."""
        _tick()
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            name = obj.__name__
            if name in _DROPPED_METHODS:
                raise LimitExceeded(f"it uses {name}()")
            if name == "join":
                return _join(*args, separator=text)
            if name == "replace":
                return _replace(text, *args)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse very wide fields, and widths that are fields themselves."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            form: str = value.__self__
            if len(form) > _MAX_BITS or _WIDE_FIELD.search(form.replace("{{", "")):
                raise LimitExceeded("it formats text too wide")
        return wrapped

    def _join_filter(
        self, values: Iterable[Any], d: str = "", attribute: str | int | None = None
    ) -> str:
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        return _join(values, d)
