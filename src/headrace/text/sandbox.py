"""Compiles and renders chat templates, which come with models and may be hostile.

Jinja's sandbox keeps a template from Python's internals. It bounds neither time nor memory, so this
runs in a process that can be killed (`renderer.py`).
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any, NoReturn, cast

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_CACHED = 8


class Refusal(TemplateError):
    """Raised by the template itself, with `raise_exception`: it refuses the conversation."""


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As in transformers: a prompt is not HTML, so nothing is escaped.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(str(message))


class _GenerationTag(Extension):
    """`{% generation %}` marks the model's turns for training; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja configured as in transformers, and with `{% do %}`."""

    def __init__(self) -> None:
        extensions = (_GenerationTag, "jinja2.ext.loopcontrols", "jinja2.ext.do")
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        cast("dict[str, Any]", self.filters)["tojson"] = _tojson
        names = cast("dict[str, Any]", self.globals)
        del names["lipsum"]
        names |= {"raise_exception": _raise_exception, "strftime_now": time.strftime}


_environment = TemplateEnvironment()


@lru_cache(maxsize=_CACHED)
def compiled(source: str) -> Template:
    """Return the template of a source.

    Raises:
        TemplateSyntaxError, or anything else: a hostile source can break the compiler.
    """
    return _environment.from_string(source)


def render(source: str, variables: dict[str, Any] | None) -> str:
    """Return the text of a template; without variables it is only compiled.

    Raises:
        Refusal: the template refuses the conversation.
        Exception: any other, as a template is code.
    """
    template = compiled(source)
    return "" if variables is None else template.render(variables)
