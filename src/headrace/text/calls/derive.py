"""Reads a format off rendered calls, in which name, keys and values are known."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, cast

from headrace.text.calls.format import Format

_FIRST, _SECOND = "probe_alpha", "probe_beta"
_KEYS = ("kite_one", "kite_two")
_VALUES = ("violet", "7")
_ENDS = re.compile(
    r"\s*(?:<\|(?:eom_id|eot_id|im_end|end|call|observation|end_of_text|END_OF_TURN_TOKEN)\|>|</s>"
    r"|<｜end▁of▁sentence｜>|<turn\|>|<end_of_turn>)\s*$"
)
_DECODER = json.JSONDecoder()
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_TAG = re.compile(r"(?s)(<[^<>=]+>\s*)(<.+)")
_CLOSING = re.compile(r"(?s)(</[^<>]+>\s*)(</.+)")


class Sample(NamedTuple):
    """Rendered calls: one, with the beginning of the turn that was cut off it, and two."""

    text: str
    head: str = ""
    two: str = ""
    identity: str = ""

    @property
    def whole(self) -> bool:
        """Whether keys and values of the call are there."""
        return all(word in self.text for word in (*_KEYS, *_VALUES))

    @property
    def name(self) -> str:
        """What is in place of the name."""
        return _FIRST if f"functions.{_FIRST}" not in self.identity else self.identity

    @property
    def second(self) -> str:
        """The same of the second call."""
        return self.name.replace(_FIRST, _SECOND).replace(":0", ":1")


class _Ends(NamedTuple):
    """The literals around a call."""

    section_open: str
    call_open: str
    call_close: str
    separator: str
    section_close: str


def derived(sample: Sample) -> Format | None:
    """Return the format of the sample, None if it is not understood."""
    if sample.name not in sample.text:
        return None
    return _payload(sample) or _named(sample) or _pairs(sample)


# Objects of JSON that have the name in them.


def _payload(sample: Sample) -> Format | None:
    where = _object_around(sample.text, _FIRST)
    if where is None:
        return None
    start, end, value = where
    array = isinstance(value, list)
    entry = cast("dict[str, Any]", value[0] if isinstance(value, list) else value)
    entry = entry["function"] if isinstance(entry.get("function"), dict) else entry
    keys = {_role(content, sample): key for key, content in entry.items()}
    if "arguments" not in keys or "name" not in keys:
        return None
    opening, closing = sample.text[:start], _ENDS.sub("", sample.text[end:])
    second = _object_around(sample.two, _SECOND)
    between = sample.two[_after_first(sample.two) : second[0]] if second and not array else ", "
    outside = bool(opening.strip()) and between.endswith(opening) and not array
    if outside:
        between = between.removesuffix(opening).removeprefix(closing)
    return Format(
        name="probed-json",
        style="json",
        call_open=opening,
        call_close=closing,
        separator=between,
        array=array,
        joined=not outside,
        name_key=keys["name"],
        arguments_key=keys["arguments"],
        id_key=keys.get("id", ""),
        ids="key" if "id" in keys else "none",
    )


def _role(content: object, sample: Sample) -> str:
    if content == _FIRST:
        return "name"
    if content == sample.identity:
        return "id"
    return "arguments" if isinstance(content, dict) and _KEYS[0] in content else "other"


def _object_around(text: str, name: str) -> tuple[int, int, Any] | None:
    """Return where the outermost JSON with the name in it begins and ends, and the value."""
    limit = text.find(f'"{name}"')
    value: Any
    for match in re.finditer(r"[\[{]", text[: max(limit, 0)]):
        try:
            value, end = _DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        entries = cast("list[Any]", value) if isinstance(value, list) else [value]
        if end > limit and isinstance(entries[0], dict):
            return match.start(), end, cast("Any", value)
    return None


def _after_first(two: str) -> int:
    first = _object_around(two, _FIRST)
    return first[1] if first else 0


# A name, then an object of JSON.


def _named(sample: Sample) -> Format | None:
    text, name = sample.text, sample.name
    at = text.index(name) + len(name)
    where = _arguments_after(text, at)
    if where is None:
        return None
    start, end = where
    name_end, id_open = text[at:start], ""
    if sample.identity and sample.identity in name_end:
        id_open, _, name_end = name_end.partition(sample.identity)
    closing = _ENDS.sub("", text[end:])
    between = ""
    if sample.second in sample.two:
        begin = sample.two.index(name) + len(name)
        first = _arguments_after(sample.two, begin)
        between = sample.two[first[1] if first else 0 : sample.two.index(sample.second)]
    ends = _ends(text[: text.index(name)], between, closing)
    return Format(
        name="probed-named",
        style="named",
        name_end=name_end,
        id_open=id_open,
        ids="marker" if id_open else "name" if name != _FIRST else "none",
        **ends._asdict(),
    )


def _arguments_after(text: str, at: int) -> tuple[int, int] | None:
    start = text.find("{", at)
    if start < 0:
        return None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (start, end) if isinstance(value, dict) and _KEYS[0] in value else None


def _ends(opening: str, between: str, closing: str) -> _Ends:
    """Separate what is around each call from what is around all of them."""
    if not between:
        return _Ends("", opening, closing, "", "")
    call_open = _whole(common(opening[::-1], between[::-1])[::-1]).lstrip()
    between = between.removesuffix(call_open)
    call_close = common(between, closing)
    call_close = call_close[: call_close.rfind(">") + 1] if "<" in call_close else call_close
    section = opening.removesuffix(call_open)
    return _Ends(
        section,
        call_open,
        call_close,
        between.removeprefix(call_close),
        closing.removeprefix(call_close),
    )


# A name, then keys and values.


def _pairs(sample: Sample) -> Format | None:
    text, pieces = sample.text, list[str]()
    for word in (_FIRST, _KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1]):
        before, match, text = text.partition(word)
        if not match:
            return None
        pieces.append(before)
    opening, to_key, to_value, to_next, to_number = pieces
    closing = _ENDS.sub("", text)
    if to_key.strip() == "(" and to_value.strip(" '\"") == "=":
        rest = closing.partition(")")[2].strip().removeprefix("]")
        return Format(
            name="probed-python",
            style="python",
            call_open=opening.rstrip().removesuffix("["),
            call_close=rest,
            separator=", ",
        )
    if to_key.strip() == "{" and to_value.startswith(":"):
        return Format(
            name="probed-gemma",
            style="gemma",
            call_open=opening,
            quote=to_value[1:],
            call_close=closing.lstrip().removeprefix("}"),
        )
    if not re.search(r"[<\[]", to_next):
        return None
    return _tagged(sample, (opening, to_key, to_value, to_next, to_number, closing))


def _tagged(sample: Sample, pieces: tuple[str, str, str, str, str, str]) -> Format:
    opening, to_key, to_value, to_next, to_number, closing = pieces
    key_open = _whole(common(to_key[::-1], to_next[::-1])[::-1]).lstrip()
    value_close = to_next.removesuffix(key_open)
    closing = closing.removeprefix(value_close)
    between = ""
    if _SECOND in sample.two:
        between = sample.two.partition(_SECOND)[0].rpartition(_VALUES[1])[2]
        between = between.removeprefix(value_close)
    ends = _nested(_ends(opening, between, closing))
    framed = to_value.endswith("\n") and value_close.startswith("\n")
    if framed:
        to_value, value_close = to_value[:-1], value_close[1:]
    key_end, value_open = _key_end(to_value)
    return Format(
        name="probed-tags",
        style="tagged",
        name_end=to_key.removesuffix(key_open),
        key_open=key_open,
        key_end=key_end,
        value_open=value_open,
        value_close=value_close,
        framed=framed,
        typed=_typed(to_value, to_number),
        **ends._asdict(),
    )


def _nested(ends: _Ends) -> _Ends:
    """Separate a tag around a single call from the call's own."""
    opening, closing = _TAG.fullmatch(ends.call_open), _CLOSING.fullmatch(ends.call_close)
    if not opening or not closing or ends.section_open:
        return ends
    separator = closing[2] + ends.separator + opening[1]
    return _Ends(opening[1], opening[2], closing[1], separator, closing[2] + ends.section_close)


def _key_end(to_value: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?s)([^<]*<[^<>]*>\s*)(<.+>)", to_value)
    return (match[1], match[2]) if match else (to_value, "")


def _typed(to_text: str, to_number: str) -> str:
    others = dict(_ATTRIBUTE.findall(to_number))
    return next(
        (name for name, value in _ATTRIBUTE.findall(to_text) if others.get(name) != value), ""
    )


def common(left: str, right: str) -> str:
    """Return the common beginning."""
    size = min(len(left), len(right))
    same = next((n for n in range(size) if left[n] != right[n]), size)
    return left[:same]


def _whole(suffix: str) -> str:
    """Drop the end of a tag, or a tag beside another, from the beginning."""
    closed = suffix.find(">")
    if closed >= 0 and "<" not in suffix[:closed]:
        suffix = suffix[closed + 1 :]
    return re.sub(r"^<[^<>]+>(?=<)", "", suffix)
