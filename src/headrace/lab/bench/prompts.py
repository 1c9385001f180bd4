"""Prompts: generated with a given number of tokens, or read from a file."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import ConfigError
from headrace.lab.bench.settings import Settings
from headrace.lab.http import Broken, Http
from headrace.lab.load import WORDS

Count = Callable[[str], Awaitable[int | None]]
_WORDS = (
    *WORDS,
    *("house", "garden", "morning", "paper", "table", "chair", "street", "light", "summer"),
    *("forest", "mountain", "bird", "fish", "apple", "green", "white", "black", "small", "large"),
    *("early", "late", "north", "south", "east", "west", "open", "close", "under", "over", "near"),
    *("far", "old", "new", "long", "short", "high", "low", "a"),
)
_AT_ONCE = 16


class PromptRequest(msgspec.Struct, frozen=True):
    """One request: `content` is a prompt or the messages of a chat, `max_tokens` the answer's."""

    content: str | list[dict[str, Any]]
    max_tokens: int


class _Entry(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


class Vocabulary(msgspec.Struct, frozen=True):
    """Words and their length in tokens; `exact` if the server has counted them.

    Every word is counted once, following another word as in a prompt: tokenizers split at spaces
    first, so that the sum is the length of the prompt, and no prompt has to be counted.
    """

    first: dict[str, int]
    later: dict[str, int]
    exact: bool = True

    def text(self, source: random.Random, tokens: int, *, begins: bool = True) -> str:
        """Return a text of `tokens` tokens; it starts with a space unless it begins a prompt."""
        words: list[str] = []
        least = min(self.later.values())
        while tokens > 0:
            costs = self.first if begins and not words else self.later
            word = source.choice(_WORDS)
            if costs[word] > tokens:
                fitting = [word for word, cost in costs.items() if cost <= tokens]
                if not fitting or tokens < least:
                    break
                word = source.choice(fitting)
            words.append(word)
            tokens -= costs[word]
        text = ("" if begins or not words else " ") + " ".join(words)
        # The rest is less than the cheapest word; a full stop is one token in most tokenizers.
        return text + "." * tokens


async def vocabulary(count: Count) -> Vocabulary:
    """Count the tokens of the words; if the server cannot, each word counts as one token."""
    base = await count("river")
    if base is None:
        costs = dict.fromkeys(_WORDS, 1)
        return Vocabulary(costs, costs, exact=False)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def cost(text: str) -> int:
        async with gate:
            return await count(text) or 0

    firsts = await asyncio.gather(*(cost(word) for word in _WORDS))
    pairs = await asyncio.gather(*(cost(f"river {word}") for word in _WORDS))
    later = {word: max(1, pair - base) for word, pair in zip(_WORDS, pairs, strict=True)}
    return Vocabulary({w: max(1, cost) for w, cost in zip(_WORDS, firsts, strict=True)}, later)


def counter(http: Http, model: str) -> Count:
    """Return a function that counts tokens by /tokenize of vLLM or of llama-server."""
    path = f"{http.place.root}/tokenize"

    async def count(text: str) -> int | None:
        for body in (
            {"model": model, "prompt": text, "add_special_tokens": False},
            {"content": text},
        ):
            try:
                status, answer = await http.fetch(path, body)
            except Broken:
                # Some services drop what they do not know, instead of refusing it.
                continue
            if status == 200 and (length := _counted(answer)):
                return length
        return None

    return count


class _Counted(msgspec.Struct):
    tokens: list[Any] | None = None
    count: int | None = None
    estimated: bool = False


def _counted(body: bytes) -> int:
    try:
        answer = msgspec.json.decode(body, type=_Counted)
    except msgspec.MsgspecError:
        return 0
    return 0 if answer.estimated else answer.count or len(answer.tokens or ())


def synthetic(settings: Settings, words: Vocabulary, seed: str) -> Iterator[PromptRequest]:
    """Yield endless prompts, the same for the same seed; they share only `shared_prefix`."""
    assert settings.prompt is not None
    source = random.Random(seed)  # noqa: S311 - the same prompts in every run
    common = words.text(random.Random(settings.seed), settings.shared_prefix)  # noqa: S311
    while True:
        length, answer = settings.prompt.draw(source), settings.output.draw(source)
        own = words.text(source, length - settings.shared_prefix, begins=not common)
        yield PromptRequest(common + own, answer)


def read(path: Path, settings: Settings) -> list[PromptRequest]:
    """Read prompts: from .jsonl objects with `prompt` or `messages`, else one per line.

    Raises:
        ConfigError: the file cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"flag --prompts: {path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = path.suffix == ".jsonl"
    source = random.Random(settings.seed)  # noqa: S311
    requests = [
        _parsed(f"{path.name}:{number}", line, settings, source) if as_json
        else PromptRequest(line, settings.output.draw(source))
        for number, line in numbered
    ]  # fmt: skip
    if not requests:
        raise ConfigError(f"flag --prompts: {path} has no prompt.")
    return requests


def reordered(request: PromptRequest) -> PromptRequest:
    """Return a request of about the same length with another beginning.

    So a cache of prefixes gets no more than what all prompts share, such as a system prompt.
    """
    if isinstance(request.content, str):
        return PromptRequest(_reversed(request.content), request.max_tokens)
    *before, last = request.content
    text = last.get("content")
    last = last | {"content": _reversed(text)} if isinstance(text, str) else last
    return PromptRequest([*before, last], request.max_tokens)


def _reversed(text: str) -> str:
    return " ".join(reversed(text.split(" ")))


def _parsed(place: str, line: str, settings: Settings, source: random.Random) -> PromptRequest:
    try:
        decoded = msgspec.json.decode(line, type=_Entry | str)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"flag --prompts: {place}: {error}.") from None
    fields = _Entry(prompt=decoded) if isinstance(decoded, str) else decoded
    content: str | list[dict[str, Any]] | None = fields.prompt or fields.messages
    if not content:
        raise ConfigError(f"flag --prompts: {place} has neither prompt nor messages.")
    if isinstance(content, list) and settings.api == "completions":
        raise ConfigError(f"flag --prompts: {place}: messages need --api chat.")
    return PromptRequest(content, fields.max_tokens or settings.output.draw(source))
