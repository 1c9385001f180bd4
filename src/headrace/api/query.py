"""The parameters of a URL."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Scope

from headrace.core.errors import InvalidRequest
from headrace.core.wording import refusal

S = TypeVar("S", bound=msgspec.Struct)


def query(scope: Scope, kind: type[S]) -> S:
    """Return the parameters of a request's URL as a struct.

    Raises:
        InvalidRequest: one is missing, unknown, wrong, or given more than once.
    """
    text = scope.get("query_string", b"").decode("latin-1")
    pairs = parse_qsl(text, keep_blank_values=True)
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequest(f"{name}: it is given more than once.", param=name)
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise refusal(error, kind) from None
