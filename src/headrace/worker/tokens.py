"""Token ids of texts, up to what a context can hold. Blocking."""

from __future__ import annotations

import threading
from typing import NamedTuple

from headrace.core.errors import ContextOverflow, Draining, InvalidRequest
from headrace.engines.abilities import Piecewise, longest_text
from headrace.engines.base import Engine
from headrace.worker.infill import Infill

_EXACT = 4096

Gone = threading.Event


class Limit(NamedTuple):
    """When to give a text up: `gone` is set, or it has more than `most` tokens."""

    gone: Gone | None = None
    most: int | None = None
    param: str = "prompt"

    def check_length(self, text: str, engine: Engine) -> None:
        """Check the bytes of a text, before a tokenizer spends time on it.

        Raises:
            ContextOverflow: even in the longest tokens of the model it would not fit.
            InvalidRequest: it is too long for a tokenizer that takes it at once.
        """
        facts = engine.facts
        # A character has at most 4 bytes.
        size = len(text) * 4
        if self.most is not None and facts.max_token_bytes is not None:
            most = self.most * facts.max_token_bytes
            if size > most and (size := len(text.encode())) > most:
                raise ContextOverflow(
                    f"The text has {size} bytes. {self.most} tokens, the context length, have at "
                    f"most {most}.",
                    param=self.param,
                )
        most = longest_text(facts)
        if size > most and not isinstance(engine, Piecewise) and len(text.encode()) > most:
            raise InvalidRequest(
                f"The text has more than {most} bytes, which are accepted at most.",
                param=self.param,
            )

    def check(self, tokens: int) -> None:
        """Check whether the rest of a text that has `tokens` so far is worth computing.

        Raises:
            ContextOverflow, Draining: it is not.
        """
        if self.gone is not None and self.gone.is_set():
            raise Draining("The request has ended.")
        # Far beyond it: within a few thousand tokens the error has their exact number.
        if self.most is not None and tokens > self.most + _EXACT:
            raise ContextOverflow(
                f"The text has more than {tokens} tokens and the context length is {self.most}.",
                param=self.param,
            )


def tokenized(
    engine: Engine, text: str, limit: Limit, *, add_special: bool = True
) -> tuple[int, ...]:
    """Return the token ids of a text. Blocking.

    Raises:
        ContextOverflow: there are more than `limit.most`; the rest is not computed then.
        InvalidRequest: it is too long for the tokenizer.
        Draining: nothing waits for them any more.
    """
    limit.check_length(text, engine)
    if not isinstance(engine, Piecewise):
        return tuple(engine.tokenize(text, add_special=add_special))
    token_ids: list[int] = []
    for piece in engine.tokenize_pieces(text, add_special=add_special):
        token_ids += piece
        limit.check(len(token_ids))
    return tuple(token_ids)


def plain_ids(infill: Infill, text: str, limit: Limit) -> tuple[int, ...]:
    """Return the token ids of a side of a gap, in which markers are text. Blocking.

    Raises:
        ContextOverflow, Draining: as `tokenized`.
        InvalidRequest: as `tokenized`, or a marker of the gap cannot be taken as text.
    """
    limit.check_length(text, infill.engine)
    token_ids: list[int] = []
    for piece in infill.engine.plain_pieces(text, infill.names):
        token_ids += piece
        limit.check(len(token_ids))
    infill.check(token_ids, limit.param)
    return tuple(token_ids)
