"""What the text of an answer has to be, whatever the engine."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.core import schema


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of an answer has to be. Exactly one of the fields is set.

    `json_schema`: JSON that the schema accepts; `{}` is any JSON. Its limits, which are those of
    `headrace.core.schema`, are checked here; whether an engine can enforce it is checked when a
    request is answered.

    `lark`: a grammar in the language of llguidance. Only the worker makes it, of the tools in a
    request.

    Raises:
        InvalidRequest: the schema is beyond a limit; names the path in it.
    """

    json_schema: dict[str, Any] = {}
    lark: str = ""

    def __post_init__(self) -> None:
        """Check the limits."""
        schema.check(self.json_schema)
