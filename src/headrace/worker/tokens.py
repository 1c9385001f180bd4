"""Token ids of texts, up to what a context can hold. Blocking."""

from __future__ import annotations

import threading
from typing import NamedTuple

from headrace.core.errors import ContextOverflow, Draining
from headrace.engines.abilities import Piecewise
from headrace.engines.base import Engine, EngineFacts
from headrace.worker.infill import Infill

_EXACT = 4096

Gone = threading.Event


class Limit(NamedTuple):
    """When to give a text up: `gone` is set, or it has more than `most` tokens."""

    gone: Gone | None = None
    most: int | None = None
    param: str = "prompt"

    def check_length(self, text: str, facts: EngineFacts) -> None:
        """Check that a text can fit, before a tokenizer spends time on it.

        Raises:
            ContextOverflow: even in the longest tokens of the model it would not.
        """
        if self.most is None or facts.max_token_bytes is None:
            return
        most = self.most * facts.max_token_bytes
        # A character has at most 4 bytes.
        if len(text) * 4 > most and (size := len(text.encode())) > most:
            raise ContextOverflow(
                f"The text has {size} bytes. {self.most} tokens, the context length, have at most "
                f"{most}.",
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
        Draining: nothing waits for them any more.
    """
    limit.check_length(text, engine.facts)
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
        InvalidRequest: a marker of the gap cannot be taken as text.
    """
    limit.check_length(text, infill.engine.facts)
    token_ids: list[int] = []
    for piece in infill.engine.plain_pieces(text, infill.names):
        token_ids += piece
        limit.check(len(token_ids))
    infill.check(token_ids, limit.param)
    return tuple(token_ids)
