"""What the text has to be: a regex, a choice, a grammar. Enforced, or refused by name."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from headrace.core.constraint import TextForm
from headrace.core.errors import ConstraintViolated, InvalidRequest, RequestError, Unsupported
from headrace.core.errors import UpstreamError as Upstream
from headrace.lab.cases.case import Case, case
from headrace.lab.cases.subject import Declared, Subject, check, refusal

_LARK = 'start: "The " NAME " is " ("red" | "blue") "."\nNAME: /[a-z]{3,9}/'
_GBNF = 'root ::= "- " word ("\\n- " word){2} "."\nword ::= [a-z] [a-z]'
_TOKENS = 60

_VALUES: dict[TextForm, tuple[tuple[Any, str], ...]] = {
    "regex": (
        (r"[A-Z]{3}-[0-9]{4}(/[a-f]{2})?", r"[A-Z]{3}-[0-9]{4}(/[a-f]{2})?"),
        (r"(?i)(red|blue|green)\n\w{2}", r"(?i)(red|blue|green)\n\w{2}"),
    ),
    "choice": (
        (("river", "mountain\nlake", 'a "sea"'), r'river|mountain\nlake|a "sea"'),
        (("7",), "7"),
    ),
    "grammar": (
        (_LARK, r"The [a-z]{3,9} is (red|blue)\."),
        (_GBNF, r"- [a-z]{2}\n- [a-z]{2}\n- [a-z]{2}\."),
    ),
}
"""Of each form values, and the pattern of the texts that they allow."""

_WRONG: dict[TextForm, Any] = {"regex": "a(", "choice": (), "grammar": "start: unknown"}

_HARD: tuple[tuple[TextForm, Any, str], ...] = (
    ("regex", "(a{1000}){1000}", "a*"),
    ("regex", r"\bword\b", "word"),
    ("regex", "(?=a)b", ""),
    ("grammar", 'start: start "a"', ""),
    ("grammar", 'start: "b" /a+/ "a"', "ba*"),
    ("grammar", 'start: "x" <|im_end|>', "x"),
    ("grammar", "root ::= root root | [a-z]", "[a-z]*"),
)


async def _enforced(subject: Subject, form: TextForm) -> None:
    given = subject.able(max_tokens=_TOKENS)
    (value, _), *_ = _VALUES[form]
    if form not in subject.capabilities.forms:
        error = await refusal(
            subject.backend.ask(subject.request(**{form: value}, **given)), Unsupported
        )
        check(error.param == form, f"The error names {error.param}.")
        raise Declared("Refused by its name.")
    for value, pattern in _VALUES[form]:
        for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
            reply = await subject.ask(**{form: value}, **(given | subject.able(**sampling)))
            kept = re.fullmatch(pattern, reply.text)
            check(kept, f"{reply.text!r} is not what {value!r} allows.")
            check(reply.reason == "stop", f"The reason is {reply.reason!r}, not stop.")
    await _of_several(subject, form)
    if not subject.is_remote and (wrong := _WRONG[form]):
        await refusal(subject.backend.ask(subject.request(**{form: wrong})), InvalidRequest)


async def _of_several(subject: Subject, form: TextForm) -> None:
    if subject.info.max_running == 1 or subject.is_remote:
        return
    value, pattern = _VALUES[form][0]
    reply = await subject.ask(**{form: value}, n=2, **subject.able(max_tokens=_TOKENS))
    for index in (0, 1):
        text = reply.choice(index)
        check(re.fullmatch(pattern, text), f"{text!r}, a choice, is not what {value!r} allows.")


def _case(form: TextForm) -> Case:
    about = f"An answer keeps to a {form}; one that is none is refused."
    run = partial(_enforced, form=form)
    return Case(name=form, rows="W11", about=about, run=run, task="generate")


@case("W11")
async def forms_fail_closed(subject: Subject) -> None:
    """What is hard to enforce is kept to, or refused by name; nothing of it is free text."""
    if not subject.capabilities.forms:
        raise Declared("Regexes, choices and grammars are refused.")
    for form, value, beginning in _HARD:
        try:
            reply = await subject.short(**{form: value}, **subject.able(max_tokens=12))
        except RequestError as error:
            check(error.param == form, f"The error names {error.param}.")
            continue
        except (ConstraintViolated, Upstream):
            # Only an upstream may find that out too late.
            if subject.is_remote:
                continue
            raise
        kept = re.fullmatch(beginning, reply.text)
        check(kept, f"{reply.text!r} is not what {value!r} allows.")


CASES = (*map(_case, _VALUES), forms_fail_closed)
