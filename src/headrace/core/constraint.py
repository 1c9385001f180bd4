"""What the text of an answer has to be, whatever the engine."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from headrace.core import schema
from headrace.core.errors import InvalidRequest

TextForm = Literal["regex", "choice", "grammar"]
"""The forms of a constraint beside a JSON schema, named like the fields that have them."""

AnyForm = Literal["json_schema"] | TextForm

FORMS: tuple[TextForm, ...] = get_args(TextForm)
ANY_FORM: tuple[AnyForm, ...] = ("json_schema", *FORMS)

MAX_REGEX = 8192
MAX_CHOICES = 4096
MAX_GRAMMAR = 65_536


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of an answer has to be. One field at most is set; with none it is any JSON.

    `json_schema`: JSON that the schema accepts; `{}` is any JSON. `regex`: the whole text, in the
    syntax of Rust. `choice`: one of these texts. `grammar`: in Lark, in the dialect of llguidance,
    or in the GBNF of llama.cpp.

    `lark`: a grammar that the worker has made itself, of one of the others or of tools.

    Limits are checked here, in linear time; whether an engine can enforce it is checked when a
    request is answered.

    Raises:
        InvalidRequest: it is beyond a limit, or several fields are set.
    """

    json_schema: dict[str, Any] = {}
    regex: str = ""
    choice: tuple[str, ...] = ()
    grammar: str = ""
    lark: str = ""

    def __post_init__(self) -> None:
        """Check the limits."""
        given = [name for name in self.__struct_fields__ if getattr(self, name)]
        if len(given) > 1:
            raise InvalidRequest(f"{given[0]} and {given[1]} are both given.", param=given[1])
        schema.check(self.json_schema)
        schema.check_regex(self.regex, MAX_REGEX)
        if len(self.grammar) > MAX_GRAMMAR:
            raise self.refusal(f"has more than {MAX_GRAMMAR} characters")
        if len(self.choice) > MAX_CHOICES:
            raise self.refusal(f"has more than {MAX_CHOICES} texts")
        if sum(map(len, self.choice)) > MAX_GRAMMAR:
            raise self.refusal(f"has more than {MAX_GRAMMAR} characters")
        for text in (self.regex, self.grammar, *self.choice):
            if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
                raise self.refusal("is not text in UTF-8")

    @property
    def form(self) -> AnyForm | Literal["lark"]:
        """The name of the field that is set."""
        for form in FORMS:
            if getattr(self, form):
                return form
        return "lark" if self.lark else "json_schema"

    @property
    def param(self) -> str:
        """The field of a request that errors of it name."""
        return self.form if self.form in FORMS else schema.PARAM

    def refusal(self, problem: str, path: schema.Path = ()) -> InvalidRequest:
        """Return the error for a constraint that has a problem, at a path of its JSON schema."""
        if self.form not in FORMS:
            return schema.refusal(path, problem)
        return InvalidRequest(f"The {self.form} {problem}.", param=self.param)


def constraint_of(form: AnyForm, value: Any) -> Constraint:
    """Return the constraint of a value that a client gave, which may be empty by mistake.

    Raises:
        InvalidRequest: it is empty, or beyond a limit.
    """
    if form != "json_schema" and not value:
        raise InvalidRequest(f"{form} is empty.", param=form)
    given: dict[str, Any] = {form: tuple(value) if form == "choice" else value}
    return Constraint(**given)
