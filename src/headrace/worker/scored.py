"""The tokens of a prompt with their log probabilities, for an echo or a field of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec.structs import replace

from headrace.core.errors import GenerationFailed, InvalidRequest, Unsupported
from headrace.core.events import Progress, PromptToken, PromptTokens
from headrace.core.model import Capabilities
from headrace.core.request import MAX_PROMPT_CANDIDATES, GenerateRequest
from headrace.engines.abilities import PromptScorer
from headrace.worker.turn import S, Turn


def check_scored(request: GenerateRequest, capabilities: Capabilities) -> None:
    """Check that an engine reports what is requested of the prompt.

    Raises:
        Unsupported, InvalidRequest: it does not.
    """
    if request.prompt_candidates is None:
        return
    name = "prompt_logprobs" if request.prompt_logprobs is not None else "echo"
    if not capabilities.prompt_logprobs:
        raise Unsupported("This engine reports no log probabilities of a prompt.", param=name)
    if request.suffix is not None:
        raise Unsupported(
            "Log probabilities of a prompt cannot be combined with a suffix.", param=name
        )


def check_size(request: GenerateRequest, tokens: int) -> None:
    """Check that what is reported of a prompt is not too much.

    Raises:
        InvalidRequest: it is.
    """
    candidates = request.prompt_candidates
    if candidates is None or tokens * (1 + candidates) * request.n <= MAX_PROMPT_CANDIDATES:
        return
    name = "prompt_logprobs" if request.prompt_logprobs is not None else "logprobs"
    raise InvalidRequest(
        f"{tokens} tokens of a prompt, with {candidates} candidates each and n {request.n}, are "
        f"more than {MAX_PROMPT_CANDIDATES} log probabilities.",
        param=name,
    )


async def prompt_events(
    turn: Turn[S, GenerateRequest], engine: PromptScorer, token_ids: Sequence[int]
) -> AsyncGenerator[Progress | PromptTokens, None]:
    """Yield progress, then the tokens of the prompt for each choice.

    Raises:
        HeadraceError: the engine fails, or the deadline passes.
    """
    request, total, tokens = turn.request, len(token_ids), list[PromptToken]()
    await turn.take_slot()
    try:
        turn.meter.admitted(total, 0)
        candidates = request.prompt_candidates or 0
        parts = engine.prompt_tokens(token_ids, candidates, request.adapter)
        async with aclosing(turn.steps(parts)) as steps:
            async for part in steps:
                turn.check()
                tokens += part
                yield Progress("prefill", len(tokens), total)
    finally:
        turn.leave_slot()
    if len(tokens) != total:
        raise GenerationFailed(f"The engine reported {len(tokens)} of {total} tokens.")
    text = ""
    if request.echo and request.sampling.logprobs is not None:
        text, tokens = _echoed(request, tokens)
    for index in range(request.n):
        yield PromptTokens(tuple(tokens), text, index)


def _echoed(request: GenerateRequest, tokens: list[PromptToken]) -> tuple[str, list[PromptToken]]:
    """Return the text of an echo, and its tokens: their data joined is the text.

    What the tokenizer has put around the client's text is no part of it.
    """
    whole = b"".join(token.data for token in tokens)
    wanted = request.prompt.encode() if isinstance(request.prompt, str) else whole
    begin = whole.find(wanted)
    if begin < 0:
        # The tokenizer has changed the text.
        begin, wanted = 0, whole
    kept: list[PromptToken] = []
    place = -begin
    for token in tokens:
        size = len(token.data)
        data = token.data[max(0, -place) : max(0, len(wanted) - place)]
        kept.append(token if len(data) == size else replace(token, data=data))
        place += size
    return wanted.decode(errors="replace"), kept
