"""The prompt of a gap in a text: its sides, what it begins with, and parts of other files."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.core.gap import Gap, SourceText
from headrace.core.request import GenerateRequest
from headrace.worker.infill import Infill
from headrace.worker.tokens import Limit, plain_ids

_CHARACTERS_PER_TOKEN = 8
"""Of what may fit into a context; tokens of source code are shorter."""
_SUFFIX_SHARE = 4
_LEAST_ANSWER = 64


def gap_ids(infill: Infill, request: GenerateRequest, limit: Limit) -> tuple[int, ...]:
    """Return the token ids of a prompt. Blocking.

    Raises:
        ContextOverflow: a side is too long, where it may not be cut.
        InvalidRequest: a text has a token that marks a side.
    """
    prompt, suffix = request.prompt or "", request.suffix or ""
    if request.gap is not None and limit.most is not None:
        room = limit.most - _answer(request, limit.most)
        return _fitted(infill, prompt, suffix, request.gap, limit._replace(most=room))
    prefix = prompt if isinstance(prompt, tuple) else plain_ids(infill, prompt, limit)
    return infill.prompt(prefix, plain_ids(infill, suffix, limit._replace(param="suffix")))


def _answer(request: GenerateRequest, context_length: int) -> int:
    """Return the tokens that are kept for the answer."""
    wanted = request.sampling.max_tokens
    return min(_LEAST_ANSWER if wanted is None else wanted, context_length // 2)


def _fitted(
    infill: Infill, prompt: str | tuple[int, ...], suffix: str, gap: Gap, limit: Limit
) -> tuple[int, ...]:
    room = (limit.most or 0) - len(infill.prompt((), ()))
    most, unbounded = room * _CHARACTERS_PER_TOKEN, limit._replace(most=None)
    begun = plain_ids(infill, gap.begun, limit)
    after = plain_ids(infill, suffix[:most], unbounded)
    before = prompt if isinstance(prompt, tuple) else _last(infill, prompt, most, unbounded)
    sides = max(room - len(begun), 0)
    if len(before) + len(after) > sides:
        after = after[: max(sides // _SUFFIX_SHARE, sides - len(before))]
        before = _end(before, sides - len(after))
    left = sides - len(before) - len(after)
    others = _others(infill, gap.others, left, unbounded)
    return infill.prompt(before, after, begun=begun, others=others)


def _others(
    infill: Infill, texts: Sequence[SourceText], room: int, limit: Limit
) -> tuple[int, ...]:
    """Return the parts of other files that fit, of the first of them only the end."""
    names = infill.files
    head = (names.project, *_name(infill, "project", limit)) if names else ()
    tail = (names.file, *_name(infill, "current", limit)) if names else ()
    room -= len(head) + len(tail)
    parts: list[tuple[int, ...]] = []
    for text in reversed(texts):
        title = (names.file, *_name(infill, text.name or "file", limit)) if names else ()
        most = room - len(title)
        if most <= 0:
            break
        whole = _last(infill, text.text, most * _CHARACTERS_PER_TOKEN, limit)
        parts.append((*title, *_end(whole, most)))
        room -= len(parts[-1])
    kept = tuple(token for part in reversed(parts) for token in part)
    return (*head, *kept, *tail) if kept else ()


def _name(infill: Infill, name: str, limit: Limit) -> tuple[int, ...]:
    return plain_ids(infill, f"{name[:256]}\n", limit)


def _last(infill: Infill, text: str, characters: int, limit: Limit) -> tuple[int, ...]:
    return plain_ids(infill, text[max(len(text) - characters, 0) :], limit)


def _end(token_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    return token_ids[max(len(token_ids) - count, 0) :]
