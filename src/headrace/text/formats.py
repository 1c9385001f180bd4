"""The values of `format` in JSON schemas, each as a regular expression or as a range.

The compilers that engines bring know different ones, and none knows all that pydantic writes. As
patterns they are the same for every engine and for the check of its answer. Where a format can be
read in two ways, the pattern is the narrower one, so that strict readers accept what it allows:
years have four digits and no leading zero, times an offset, hosts of e-mail addresses a dot, and
names of hosts and addresses the lengths of DNS and SMTP.
"""

from __future__ import annotations

from typing import Any

_YEAR = "[1-9][0-9]{3}"
_LEAP = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP}-02-29)"
)
_HOUR = "(?:[01][0-9]|2[0-3])"
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"

_DAYS = "[0-9]{1,6}D"
_MONTHS = f"(?:[0-9]{{1,6}}M(?:{_DAYS})?|{_DAYS})"
_YEARS = f"(?:[0-9]{{1,4}}Y(?:{_MONTHS})?|{_MONTHS})"
_SECONDS = "[0-9]{1,9}S"
_MINUTES = f"(?:[0-9]{{1,9}}M(?:{_SECONDS})?|{_SECONDS})"
_HOURS = f"T(?:[0-9]{{1,9}}H(?:{_MINUTES})?|{_MINUTES})"
_DURATION = f"P(?:[0-9]{{1,6}}W|{_YEARS}(?:{_HOURS})?|{_HOURS})"

_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
# Of 39 characters at most, and no two hyphens, as in names that are encoded.
_REST_OF_LABEL = "(?:-?[A-Za-z0-9]){0,19}"
_LABEL = f"[A-Za-z0-9]{_REST_OF_LABEL}"
_TOP = f"[A-Za-z]{_REST_OF_LABEL}"
_HOSTNAME = f"(?:{_LABEL}\\.){{0,5}}{_TOP}"
_EMAIL = f"{_ATOM}{{1,32}}(?:\\.{_ATOM}{{1,16}})?@(?:{_LABEL}\\.){{1,4}}{_TOP}"

_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"(?:{_BYTE}\\.){{3}}{_BYTE}"
_WORD = "[0-9A-Fa-f]{1,4}"
_SPLIT = "|".join(f"(?:{_WORD}:){{1,{7 - n}}}(?::{_WORD}){{1,{n}}}" for n in range(1, 7))
_IPV6 = f"(?:(?:{_WORD}:){{7}}{_WORD}|(?:{_WORD}:){{1,7}}:|{_SPLIT}|:(?:(?::{_WORD}){{1,7}}|:))"

_HEX = "[0-9A-Fa-f]"
_UUID = f"{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}"

_SHOWN = "[A-Za-z0-9._~!$&'()*+,;=:@-]"
_CHARACTER = f"(?:{_SHOWN}|%{_HEX}{{2}})"
_FIRST = f"(?:{_SHOWN.replace(':', '')}|%{_HEX}{{2}})+"
_PORT = "(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_USER = f"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%{_HEX}{{2}})*@"
_AUTHORITY = f"(?:{_USER})?(?:{_HOSTNAME}|{_IPV4}|\\[{_IPV6}\\])(?::{_PORT})?"
_ABSOLUTE = f"//{_AUTHORITY}(?:/{_CHARACTER}*)*|/(?:{_CHARACTER}+(?:/{_CHARACTER}*)*)?"
_REST = f"(?:\\?(?:{_CHARACTER}|[/?])*)?(?:#(?:{_CHARACTER}|[/?])*)?"
_URI = f"[A-Za-z][A-Za-z0-9+.-]*:(?:{_ABSOLUTE}|{_CHARACTER}+(?:/{_CHARACTER}*)*){_REST}"
_RELATIVE = f"(?:{_ABSOLUTE}|{_FIRST}(?:/{_CHARACTER}*)*)?{_REST}"


def _versioned(version: int) -> str:
    return f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89ABab]{_HEX}{{3}}-{_HEX}{{12}}"


def _base64(letters: str) -> str:
    return f"(?:[{letters}]{{4}})*(?:[{letters}]{{2}}==|[{letters}]{{3}}=)?"


PATTERNS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "duration": _DURATION,
    "email": _EMAIL,
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": f"{_IPV4}|{_IPV6}",
    "uuid": _UUID,
    **{f"uuid{version}": _versioned(version) for version in range(1, 9)},
    "uri": _URI,
    "uri-reference": f"{_URI}|{_RELATIVE}",
    "json-pointer": "(?:/(?:[^/~]|~[01])*)*",
    "byte": _base64("A-Za-z0-9+/"),
    "base64url": _base64("A-Za-z0-9_-"),
}
"""The formats of texts, each with the pattern of the whole text."""

RANGES: dict[str, dict[str, Any]] = {
    "int32": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "uint32": {"minimum": 0, "maximum": 2**32 - 1},
    "float": {},
    "double": {},
}
"""The formats of numbers, each with its range."""

UNRESTRICTED = frozenset({"binary", "directory-path", "file-path", "password", "path"})
"""Formats of texts that say what a text is for, and not how it is written."""
