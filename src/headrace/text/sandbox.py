"""Where a chat template runs: it comes with a model, so it may be hostile.

Beyond Jinja's own sandbox, time and size are bounded. A template can only take long by loops
and calls, and can only build long texts from pieces, so the generated code is made to look
at the clock in both, and what joins or repeats is measured before it is done.
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
# They repeat or pad by a number, or cannot be measured beforehand. Chat templates do without.
_DROPPED_FILTERS = ("batch", "center", "format", "sum", "urlize", "wordwrap", "xmlattr")
_DROPPED_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})

T = TypeVar("T")


class LimitExceeded(SecurityError):
    """The template took too long or made too much."""


class Refusal(TemplateError):
    """The template's own `raise_exception`: it does not take this conversation."""


class _Meter(threading.local):
    """What the rendering in this thread may still use: until when, and how many characters."""

    end: float = math.inf
    left: int = _MAX_TOTAL


_meter = _Meter()


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do `work`, which compiles or renders in this thread.

    Raises:
        LimitExceeded: it took longer than `seconds`, or made too much.
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
    # As transformers does: a prompt is no web page, so nothing is escaped for HTML.
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
    """Characters of a text; for lists, about as many as take the same memory."""
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
    """`{% generation %}` marks the model's own words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Generator(CodeGenerator):
    """Compiles a look at the clock into each block, the bodies of loops among them."""

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
    """Jinja as transformers sets it up for chat templates, with bounds on time and size."""

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
        """Call from a template: macros look at the clock, methods of text are measured."""
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
        """Refuse fields wider than any text needs, and widths that are themselves fields."""
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
