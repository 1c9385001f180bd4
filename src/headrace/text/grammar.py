"""The grammar of a constraint, in the language of llguidance."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from headrace.core.constraint import Constraint
from headrace.core.errors import Unsupported
from headrace.core.schema import Path, Schema, children, refusal
from headrace.text import formats, numbers

# With free white space a small model can repeat it up to the limit.
_SPACING = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
}


HEADER = '%llguidance {"no_forcing": true}'
"""Of all grammars. The search for text that has to follow can take without end, and that text can
be the name of a special token, which is not text: engines then answered freely."""

_START = "\nstart: "
ANSWER = "headrace_answer"
"""The rule of an answer within a larger grammar."""
_SLASHES = re.compile(r"\\.|/|\n", re.DOTALL)


def grammar(constraint: Constraint) -> str:
    """Return the grammar of a constraint, for every engine that takes llguidance's.

    That of a client has to be made a `lark` before.

    Raises:
        InvalidRequest: the schema has a format that cannot be enforced; names its path.
    """
    match constraint.form:
        case "lark":
            return constraint.lark
        case "regex":
            return f"{HEADER}{_START}{as_terminal(constraint.regex)}\n"
        case "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.choice)
            # As a terminal they are one automaton, and no limit of alternatives counts.
            return f"{HEADER}{_START}CHOICE\nCHOICE: {texts}\n"
        case "grammar":
            raise AssertionError("compiled to Lark before")
        case "json_schema":
            return schema_grammar(without_formats(constraint.json_schema))


def as_terminal(regex: str) -> str:
    """Return a regex as a grammar has it."""
    return f"/{_SLASHES.sub(_escaped, regex)}/"


def schema_grammar(schema: Schema) -> str:
    """Return the grammar of a schema as it is."""
    return f"{HEADER}{_START}{json_rule(schema)}"


def json_rule(schema: Schema) -> str:
    """Return the body of a rule for JSON that a schema accepts."""
    # The last of equal keys counts: what the schema itself says is not heard.
    return "%json " + json.dumps({**numbers.as_compiled(schema), **_SPACING})


def after(prefix: str, rules: str, lark: str) -> str:
    """Return a grammar with `prefix` before it, whose rules are `rules`."""
    return f"{HEADER}\n{_as_rules(lark)}{_START}{prefix} {ANSWER}\n{rules}\n"


def answer_rules(constraint: Constraint) -> str:
    """Return the rules of a constraint, in which `ANSWER` is the answer, for a larger grammar.

    Raises:
        InvalidRequest: as `grammar`.
        Unsupported: it is a client's grammar, which has names of its own.
    """
    if constraint.form == "grammar":
        message = "A grammar cannot be combined with tools; a JSON schema, regex or choice can."
        raise Unsupported(message, param=constraint.param)
    return _as_rules(grammar(constraint))


def _as_rules(lark: str) -> str:
    before, _, body = lark.removeprefix(HEADER).rpartition(_START)
    # What comes after the first rule are other rules.
    return f"{before}\n{ANSWER}: {body}"


def regex_position(regex: str, at: int) -> int:
    """Return which character of a regex is at a position of it in a grammar."""
    added = 0
    for match in _SLASHES.finditer(regex):
        if match.start() + added >= at:
            break
        added += len(_escaped(match)) - len(match[0])
    return at - added


def _escaped(match: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(match[0], match[0])


def without_formats(schema: Schema, *, strict: bool = True) -> dict[str, Any]:
    """Return the schema with patterns and ranges in place of `format`.

    Without `strict`, formats that are not known are kept.

    Raises:
        InvalidRequest: with `strict`, a format is not known.
    """
    copy = json.loads(json.dumps(schema))
    pending: list[tuple[Path, Any]] = [((), copy)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            part = cast("dict[str, Any]", node)
            pending += [((*path, *below), child) for below, child in children(part)]
            _replace(path, part, strict=strict)
    return copy


def _replace(path: Path, schema: dict[str, Any], *, strict: bool) -> None:
    name = schema.get("format")
    if not isinstance(name, str):
        return
    pattern, addition = formats.PATTERNS.get(name), formats.RANGES.get(name)
    if pattern is not None:
        addition = {"pattern": f"^(?:{pattern})$"}
    elif addition is None:
        if strict and name not in formats.UNRESTRICTED:
            raise refusal((*path, "format"), f"is {name[:64]!r}, which cannot be enforced")
        return
    del schema["format"]
    if schema.keys().isdisjoint(addition):
        schema |= addition
    else:
        schema.setdefault("allOf", []).append(addition)
