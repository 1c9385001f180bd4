"""Formats as patterns, and the grammar of a schema."""

from __future__ import annotations

import re

import pytest

from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest
from headrace.text.formats import PATTERNS
from headrace.text.grammar import grammar, without_formats

GOOD = {
    "date": ("2024-02-29", "2023-12-31", "2000-02-29"),
    "date-time": ("2024-01-02T03:04:05Z", "2024-01-02T23:59:59.123+01:00"),
    "time": ("03:04:05Z", "03:04:05.5-11:30"),
    "duration": ("P1Y2M3DT4H5M6S", "PT5M", "P3W", "P1D", "P1Y"),
    "email": ("jo@example.org", "jo.x+y@mail.example.co"),
    "hostname": ("localhost", "a-b.example.org"),
    "ipv4": ("0.0.0.0", "255.249.199.10"),
    "ipv6": ("::", "::1", "1::2", "1:2:3:4:5:6:7:8", "fe80::1:2", "1:2:3:4:5:6:7::"),
    "ipvanyaddress": ("1.2.3.4", "::1"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000",),
    "uuid4": ("123e4567-e89b-42d3-a456-426614174000",),
    "uri": (
        *("https://example.com/a%20b?c=d&e#f", "mailto:jo@example.org", "urn:isbn:123"),
        *("http://jo:x@[::1]:8080/", "http://192.168.0.1", "data:text/plain,x"),
    ),
    "uri-reference": ("/a/b", "../x?y", "#z", "", "https://a.b/c", "//a.b/c"),
    "json-pointer": ("", "/a/~0b/~1"),
    "byte": ("", "YWJj", "YQ==", "YWI="),
    "base64url": ("_-8=",),
}
BAD = {
    "date": ("2023-02-29", "1900-02-29", "2023-04-31", "2023-13-01", "23-01-01", "2023-1-1"),
    "date-time": ("2024-01-02", "2024-01-02T03:04:05", "2024-01-02T24:00:00Z"),
    "time": ("03:04", "25:00:00Z", "03:04:05"),
    "duration": ("P", "PT", "1D", "P1S", "P1Y1W", "P1D2H"),
    "email": ("jo", "jo@", "@x.org", "jo@x", "a b@x.org", "jo@x..org"),
    "hostname": ("-a", "a-", "a..b", "", "a_b"),
    "ipv4": ("256.0.0.1", "1.2.3", "01.2.3.4"),
    "ipv6": ("1", ":::", "1::2::3", "1:2:3:4:5:6:7", "g::", "1:2:3:4:5:6:7:8:9"),
    "uuid": ("123e4567e89b12d3a456426614174000", "x"),
    "uuid4": ("123e4567-e89b-12d3-a456-426614174000",),
    "uri": ("", "example.com", "http://a b", "http://[::1", "http://a:99999", "//a.b", "http://1.2.3.999"),
    "uri-reference": ("a b", "http://a b", "\\"),
    "json-pointer": ("a", "/~2"),
    "byte": ("YQ=", "Y", "_-8="),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_a_format_is_its_pattern(name: str) -> None:
    """Issue 11.4: uri, date-time, email, uuid and the others that pydantic writes."""
    pattern = re.compile(f"^(?:{PATTERNS[name]})$")
    assert [text for text in GOOD.get(name, ()) if not pattern.search(text)] == []
    assert [text for text in BAD.get(name, ()) if pattern.search(text)] == []


def test_formats_become_patterns_wherever_they_are() -> None:
    """Issue 11.4: beside a pattern or a bound too, and the client's schema stays as it is."""
    given = {
        "properties": {
            "a": {"type": "string", "format": "uuid"},
            "b": {"type": "string", "format": "date", "pattern": "^2"},
            "c": {"type": "integer", "format": "int32"},
            "format": {"type": "string", "format": "password"},
        },
        "const": {"format": "uri"},
    }
    made = without_formats(given)
    uuid, date = (f"^(?:{PATTERNS[name]})$" for name in ("uuid", "date"))
    assert made["properties"] == {
        "a": {"type": "string", "pattern": uuid},
        "b": {"type": "string", "pattern": "^2", "allOf": [{"pattern": date}]},
        "c": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
        "format": {"type": "string", "format": "password"},
    }
    assert made["const"] == {"format": "uri"}
    assert given["properties"]["a"] == {"type": "string", "format": "uuid"}


@pytest.mark.parametrize("name", ["regex", "iri", "int64", "no-such-format"])
def test_a_format_that_cannot_be_enforced_is_refused(name: str) -> None:
    """Issue 11.4: it is named with its path, and never taken for a remark."""
    constraint = Constraint(json_schema={"items": {"type": "string", "format": name}})
    with pytest.raises(InvalidRequest, match=f"^/items/format in the JSON schema is '{name}'"):
        grammar(constraint)
    assert without_formats(constraint.json_schema, strict=False) == constraint.json_schema
