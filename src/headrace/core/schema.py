"""JSON schemas: their subschemas, and the limits that one from a client has to keep.

A schema of a few bytes can describe a grammar of gigabytes. So its size, its numbers and its
repetitions are checked before anything is made of it, in time linear in its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from headrace.core.errors import InvalidRequest

Schema = Mapping[str, Any]
Path = tuple[str, ...]

PARAM = "response_format"
"""The field of a request that errors of its schema name."""

MAX_BYTES = 128 * 1024
MAX_DEPTH = 64
MAX_VALUES = 10_000
MAX_LITERAL = 8192
MAX_ENUM = 4096
MAX_COUNT = 4096
MAX_LENGTH = 65_536
MAX_NUMBER = 2**64
MAX_MULTIPLE = 1000
"""Beyond some 4,000 the compiler gives up within long numbers, and the answer ends with an error.

With tokens of three digits it does so for smaller ones too, which `worker.exact` finds out.
"""
MAX_PATTERN = 1024
MAX_REPETITIONS = 4096
MAX_ALTERNATIVES = 1024
MAX_APPLIED = 16_384
MAX_SMALLEST = 65_536
MAX_LEVELS = 128
MAX_OPEN = 1900
"""Of what can come next in an answer, in items of llguidance's parser, which follows 2,000."""

BOUNDS = {"minimum": -1, "exclusiveMinimum": 0, "maximum": 1, "exclusiveMaximum": 0}
"""How far from each bound of a number is the nearest integer that it excludes."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    *("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_LIMITS = {
    **dict.fromkeys(("minItems", "maxItems", "minProperties", "maxProperties"), MAX_COUNT),
    **dict.fromkeys(("minContains", "maxContains"), MAX_COUNT),
    **dict.fromkeys(("minLength", "maxLength"), MAX_LENGTH),
    **dict.fromkeys(BOUNDS, MAX_NUMBER),
    "multipleOf": MAX_MULTIPLE,
}
_REFERENCES = {"$dynamicRef", "$recursiveRef"}
_LONGEST_PATH = 200


def pointer(path: Path) -> str:
    """Return a path as a JSON pointer."""
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)


def refusal(path: Path, problem: str) -> InvalidRequest:
    """Return the error for a part of a schema; the path is written as a JSON pointer."""
    where = f"{pointer(path)[:_LONGEST_PATH]} in the JSON schema" if path else "The JSON schema"
    return InvalidRequest(f"{where} {problem}.", param=PARAM)


def children(schema: Schema) -> Iterator[tuple[Path, Any]]:
    """Yield the subschemas of a schema, each with its path from there."""
    for keyword in schema:
        value = schema[keyword]
        if keyword in _MAPS and isinstance(value, Mapping):
            yield from (((keyword, name), child) for name, child in _items(cast("Schema", value)))
        elif isinstance(value, list) and (keyword in _LISTS or keyword == "items"):
            places = enumerate(cast("list[Any]", value))
            yield from (((keyword, str(place)), child) for place, child in places)
        elif keyword in _SINGLE:
            yield (keyword,), value


def check(schema: Schema) -> None:
    """Check the limits of a schema.

    Raises:
        InvalidRequest: names the path in the schema, and the limit.
    """
    _check_values(schema)
    _check_schemas(schema)
    _Measure(schema).of(schema, ())


def resolved(root: Schema, reference: str, path: Path) -> tuple[Path, Schema | bool]:
    """Return the path and the value of what a reference names within its schema.

    Raises:
        InvalidRequest: it is not there, or elsewhere.
    """
    if reference != "#" and not reference.startswith("#/"):
        raise refusal(path, "is not a reference within the schema, like #/$defs/name")
    parts = tuple(part.replace("~1", "/").replace("~0", "~") for part in reference.split("/")[1:])
    value: Any = root
    for part in parts:
        if isinstance(value, Mapping) and part in value:
            value = cast("Schema", value)[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):  # pyright: ignore[reportUnknownArgumentType]
            value = cast("list[Any]", value)[int(part)]
        else:
            raise refusal(path, "refers to something that is not there")
    if not isinstance(value, Mapping | bool):
        raise refusal(path, "refers to something that is no schema")
    return parts, cast("Schema | bool", value)


def _check_values(schema: Schema) -> None:
    """Check the size of the JSON, whatever it means."""
    pending: list[tuple[Path, Any]] = [((), schema)]
    for path, value in _popped(pending):
        if len(path) > MAX_DEPTH:
            raise refusal(path, f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            for name, member in _items(cast("Schema", value)):
                _check_text(path, name)
                pending.append(((*path, name), member))
        elif isinstance(value, list | tuple):
            entries = enumerate(cast("Sequence[Any]", value))
            pending += [((*path, str(place)), entry) for place, entry in entries]
        else:
            _check_scalar(path, value)
    try:
        size = len(msgspec.json.encode(schema))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise refusal((), f"is not JSON: {error}") from error
    if size > MAX_BYTES:
        raise refusal((), f"has {size} bytes, and at most {MAX_BYTES} are accepted")


def _popped(pending: list[tuple[Path, Any]]) -> Iterator[tuple[Path, Any]]:
    for _ in range(MAX_VALUES):
        if not pending:
            return
        yield pending.pop()
    raise refusal((), f"has more than {MAX_VALUES} values")


def _check_scalar(path: Path, value: object) -> None:
    if isinstance(value, str):
        _check_text(path, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise refusal(path, "is not a finite number")
    elif isinstance(value, int) and not -MAX_NUMBER // 2 <= value < MAX_NUMBER:
        raise refusal(path, "is not between -2^63 and 2^64, which integers have to be")


def _check_text(path: Path, text: object) -> None:
    if not isinstance(text, str):
        raise refusal(path, "has a key that is not a text")
    if len(text) > MAX_LITERAL:
        raise refusal(
            path, f"has a text of {len(text)} characters, and at most {MAX_LITERAL} are accepted"
        )


def _check_schemas(root: Schema) -> None:
    """Check the keywords of all subschemas."""
    if "x-guidance" in root:
        raise refusal(("x-guidance",), "is not accepted")
    pending: list[tuple[Path, Any]] = [((), root)]
    while pending:
        path, schema = pending.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, Mapping):
            raise refusal(path, "is no schema")
        _check_keywords(path, cast("Schema", schema))
        pending += [((*path, *below), child) for below, child in children(cast("Schema", schema))]


def _check_keywords(path: Path, schema: Schema) -> None:
    for keyword in schema.keys() & _LIMITS.keys():
        value, limit = number(schema, keyword), _LIMITS[keyword]
        if value is not None and abs(value) > limit:
            raise refusal((*path, keyword), f"is {value}, and at most {limit} is accepted")
    for keyword in schema.keys() & _REFERENCES:
        raise refusal((*path, keyword), "is not supported")
    values = schema.get("enum")
    if isinstance(values, list) and len(cast("list[Any]", values)) > MAX_ENUM:
        raise refusal((*path, "enum"), f"has more than {MAX_ENUM} entries")
    for place, pattern in _patterns(schema):
        if problem := _problem_of(pattern, MAX_PATTERN):
            raise refusal((*path, *place), problem)


def _patterns(schema: Schema) -> Iterator[tuple[Path, str]]:
    if isinstance(pattern := schema.get("pattern"), str):
        yield ("pattern",), pattern
    patterns = schema.get("patternProperties")
    for name in cast("Schema", patterns) if isinstance(patterns, Mapping) else ():
        yield ("patternProperties", name), name


def number(schema: Schema, keyword: str) -> float | None:
    """Return the number that a keyword has; None if it has none."""
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


_TOKENS = re.compile(
    r"""\\[pPxuU]\{[^}]*\} | \\. | \[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]
    | (?P<open>\() | (?P<close>\)) | \{(?P<low>\d+)(?:,(?P<high>\d*))?\} | .""",
    re.VERBOSE | re.DOTALL,
)


def check_regex(regex: str, most: int) -> None:
    """Check the length of a regular expression, as it is and with its repetitions written out.

    Raises:
        InvalidRequest: it has more than `most` characters, or too many elements.
    """
    if problem := _problem_of(regex, most):
        raise InvalidRequest(f"The regex {problem}.", param="regex")


def _problem_of(regex: str, most: int) -> str:
    if len(regex) > most:
        return f"has more than {most} characters"
    if regex_elements(regex) > MAX_REPETITIONS:
        return f"repeats to more than {MAX_REPETITIONS} elements"
    return ""


def regex_elements(regex: str) -> int:
    """Return how many elements a regular expression has with its repetitions written out."""
    return elements(_TOKENS.finditer(regex))


def elements(tokens: Iterable[re.Match[str]], sizes: Callable[[str], int] = lambda _: 1) -> int:
    """Return how many elements an expression has with its repetitions written out.

    The groups of a token say what it does: it opens or closes a group, or repeats the element
    before it `low` to `high` times. Any other is an element, of which `sizes` knows the size. More
    than `MAX_REPETITIONS` are not counted any further.
    """
    # For each open group: what it has before its last element, and that element.
    groups = [[0, 0]]
    for token in tokens:
        if token["open"]:
            groups.append([0, 0])
            continue
        if times := token["high"] or token["low"]:
            # Of a number with many digits, so many are enough.
            groups[-1][1] *= max(1, int(times[:9]))
        else:
            size = 0 if token["close"] else sizes(token[0])
            before, last = groups.pop() if token["close"] and len(groups) > 1 else (0, size)
            groups[-1] = [sum(groups[-1]), before + last]
        if sum(map(sum, groups)) > MAX_REPETITIONS:
            break
    return sum(map(sum, groups))


class _Extent(NamedTuple):
    """How large a schema is when its references and combinations are written out.

    `alternatives`: into which `anyOf` inside of `allOf` can be multiplied out. `applied`: schemas
    that apply to the same value. `smallest`: values and characters of the smallest answer. `open`:
    what the parser has to follow when a value has begun: 4 for each property that may be left out.
    `arrays`: of the alternatives, those that can be arrays, of which each takes it 6.
    """

    alternatives: float = 1
    applied: float = 1
    smallest: float = 1
    open: float = 0
    arrays: float = 1

    @property
    def followed(self) -> float:
        """What the parser has to follow in all."""
        return self.open + 6 * self.arrays


class _Measure:
    """Measures the parts of one schema, each once; a part inside of itself counts as nothing."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._extents: dict[int, _Extent] = {}
        self._levels = 0

    def of(self, schema: Any, path: Path) -> _Extent:
        """Return the extent of a subschema.

        Raises:
            InvalidRequest: it is beyond a limit.
        """
        if not isinstance(schema, Mapping):
            return _Extent()
        node = cast("Schema", schema)
        if (known := self._extents.get(id(node))) is not None:
            return known
        self._extents[id(node)] = _Extent()
        self._levels += 1
        if self._levels > MAX_LEVELS:
            raise refusal(path, f"is more than {MAX_LEVELS} levels deep with its references")
        extent = self._extents[id(node)] = self._computed(node, path)
        self._levels -= 1
        if extent.alternatives > MAX_ALTERNATIVES:
            raise refusal(path, f"combines to more than {MAX_ALTERNATIVES} alternatives")
        if extent.applied > MAX_APPLIED:
            raise refusal(path, f"applies more than {MAX_APPLIED} schemas to one value")
        if extent.smallest > MAX_SMALLEST:
            raise refusal(path, f"has no answer of less than {MAX_SMALLEST} values and characters")
        if extent.followed > MAX_OPEN:
            problem = "has too much that can come next; make more properties required"
            raise refusal(path, f"{problem} (it takes {extent.followed:.0f} of {MAX_OPEN})")
        return extent

    def _computed(self, schema: Schema, path: Path) -> _Extent:
        below = {part: self.of(child, (*path, *part)) for part, child in children(schema)}
        together = [extent for part, extent in below.items() if part[0] == "allOf"]
        if isinstance(reference := schema.get("$ref"), str):
            together.append(self._referred(reference, (*path, "$ref")))
        alternatives = math.prod(extent.alternatives for extent in together)
        applied = 1 + sum(extent.applied for extent in together)
        smallest = max([_least(schema, below), *(extent.smallest for extent in together)])
        opened = _open(schema) + sum(extent.open for extent in together)
        arrays = _can_be_array(schema) * math.prod(extent.arrays for extent in together)
        for keyword in ("anyOf", "oneOf"):
            if choices := [extent for part, extent in below.items() if part[0] == keyword]:
                alternatives *= sum(extent.alternatives for extent in choices)
                applied += sum(extent.applied for extent in choices)
                smallest = max(smallest, min(extent.smallest for extent in choices))
                opened += sum(extent.open for extent in choices)
                arrays *= sum(extent.arrays for extent in choices)
        return _Extent(alternatives, applied, smallest, opened, arrays)

    def _referred(self, reference: str, path: Path) -> _Extent:
        target, schema = resolved(self._root, reference, path)
        return self.of(schema, target)


def _open(schema: Schema) -> int:
    """Return what the parser has to follow of one schema when a value has begun."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping):
        return 0
    needed = {*map(str, cast("list[Any]", required))} if isinstance(required, list) else set[str]()
    return 4 * sum(name not in needed for name in cast("Schema", properties))


def _can_be_array(schema: Schema) -> bool:
    """Return whether the keywords of one schema leave it open that the value is an array."""
    kinds = schema.get("type", "array")
    is_open = "array" in kinds if isinstance(kinds, str | list) else True
    return is_open and schema.keys().isdisjoint(("const", "enum"))


def _least(schema: Schema, below: Mapping[Path, _Extent]) -> float:
    """Return the values and characters that the keywords of one schema demand at least."""
    kinds = schema.get("type")
    if kinds == "string":
        return max(1, number(schema, "minLength") or 0)
    if kinds == "array":
        first = [extent.smallest for part, extent in below.items() if part[0] == "prefixItems"]
        count = int(number(schema, "minItems") or 0)
        each = below.get(("items",), _Extent()).smallest
        return 1 + sum(first[:count]) + max(0, count - len(first)) * each
    if kinds == "object":
        required = schema.get("required")
        names = cast("list[Any]", required) if isinstance(required, list) else []
        keys = [("properties", name) for name in names if isinstance(name, str)]
        least = max(0, (number(schema, "minProperties") or 0) - len(keys))
        each = below.get(("additionalProperties",), _Extent()).smallest
        return 1 + sum(below.get(key, _Extent()).smallest for key in keys) + least * each
    return 1


def _items(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return iter(cast("Mapping[str, Any]", value).items())
