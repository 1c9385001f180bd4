"""What editors say of a gap in a text, beside what is before and after it."""

from __future__ import annotations

import msgspec

from headrace.core.errors import InvalidRequest


class SourceText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of another file; `name` is that of the file."""

    text: str
    name: str = ""


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """A gap whose text has `begun`: the answer goes on after it.

    `others` are parts of other files, the most important last. What does not fit into the context
    is cut: the first of the others, then the prefix at its beginning and the suffix at its end.
    """

    begun: str = ""
    others: tuple[SourceText, ...] = ()


class LineLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an answer ends after its first line break.

    `indent` ends it before a line with text that has fewer white-space characters before that;
    `after_ms` so many milliseconds after its first token.

    Raises:
        InvalidRequest: one of them is negative.
    """

    indent: int = 0
    after_ms: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.indent < 0 or (self.after_ms is not None and self.after_ms < 0):
            raise InvalidRequest("A limit of lines is negative.", param="line_limits")
