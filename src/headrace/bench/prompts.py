"""What is asked: made up with a set number of tokens, or from a file."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.bench.http import Http
from headrace.bench.settings import Settings
from headrace.core.errors import ConfigError

Count = Callable[[str], Awaitable[int | None]]
_WORDS = (
    *("river", "stone", "mill", "water", "wheel", "bridge", "valley", "winter", "bread", "flour"),
    *("grain", "farmer", "market", "road", "horse", "child", "music", "letter", "window", "ship"),
    *("house", "garden", "morning", "paper", "table", "chair", "street", "light", "summer"),
    *("forest", "mountain", "bird", "fish", "apple", "green", "white", "black", "small", "large"),
    *("early", "late", "north", "south", "east", "west", "open", "close", "under", "over", "near"),
    *("far", "old", "new", "long", "short", "high", "low", "a"),
)
_AT_ONCE = 16


class Ask(msgspec.Struct, frozen=True):
    """One request: `content` is a prompt, or the messages of a chat; and how long the answer is."""

    content: str | list[dict[str, Any]]
    max_tokens: int


class _Line(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None


class Vocabulary(msgspec.Struct, frozen=True):
    """Words and what each costs in tokens; `exact` when the server has told.

    Every word is counted once behind another, as it stands in a prompt: tokenizers cut at spaces
    first, so the sum is that of the prompt, and no prompt has to be counted.
    """

    first: dict[str, int]
    later: dict[str, int]
    exact: bool = True

    def text(self, source: random.Random, tokens: int, *, begins: bool = True) -> str:
        """Return a text of so many tokens; one that does not begin has a space in front."""
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
        # What is left is less than the cheapest word; a full stop is one token nearly everywhere.
        return text + "." * tokens


async def vocabulary(count: Count) -> Vocabulary:
    """Ask what the words cost; where the server cannot tell, each is taken for one token."""
    base = await count("river")
    if base is None:
        ones = dict.fromkeys(_WORDS, 1)
        return Vocabulary(ones, ones, exact=False)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def cost(text: str) -> int:
        async with gate:
            return await count(text) or 0

    firsts = await asyncio.gather(*(cost(word) for word in _WORDS))
    pairs = await asyncio.gather(*(cost(f"river {word}") for word in _WORDS))
    later = {word: max(1, pair - base) for word, pair in zip(_WORDS, pairs, strict=True)}
    return Vocabulary({w: max(1, one) for w, one in zip(_WORDS, firsts, strict=True)}, later)


def counter(http: Http, model: str) -> Count:
    """Return what counts tokens by /tokenize, in the form of vLLM or that of llama-server."""
    path = f"{http.place.root}/tokenize"

    async def count(text: str) -> int | None:
        for body in (
            {"model": model, "prompt": text, "add_special_tokens": False},
            {"content": text},
        ):
            status, told = await http.fetch(path, body)
            if status == 200 and (found := _counted(told)):
                return found
        return None

    return count


class _Counted(msgspec.Struct):
    tokens: list[Any] | None = None
    count: int | None = None
    estimated: bool = False


def _counted(body: bytes) -> int:
    try:
        told = msgspec.json.decode(body, type=_Counted)
    except msgspec.MsgspecError:
        return 0
    return 0 if told.estimated else told.count or len(told.tokens or ())


def synthetic(settings: Settings, words: Vocabulary, seed: str) -> Iterator[Ask]:
    """Yield prompts without end, the same for the same seed; only `shared_prefix` is in common."""
    assert settings.prompt is not None
    source = random.Random(seed)  # noqa: S311 - the same prompts in every run
    common = words.text(random.Random(settings.seed), settings.shared_prefix)  # noqa: S311
    while True:
        length, answer = settings.prompt.draw(source), settings.output.draw(source)
        own = words.text(source, length - settings.shared_prefix, begins=not common)
        yield Ask(common + own, answer)


def read(path: Path, settings: Settings) -> list[Ask]:
    """Read prompts: of .jsonl objects with `prompt` or `messages`, else one a line.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"flag --prompts: {path} cannot be read: {error}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = path.suffix == ".jsonl"
    source = random.Random(settings.seed)  # noqa: S311
    found = [
        _ask(f"{path.name}:{number}", line, settings, source) if as_json
        else Ask(line, settings.output.draw(source))
        for number, line in numbered
    ]  # fmt: skip
    if not found:
        raise ConfigError(f"flag --prompts: {path} has no prompt.")
    return found


def reordered(ask: Ask) -> Ask:
    """Return a request of about the same length whose beginning is another.

    So it is in the cache of prefixes after it only by what all have in common, as a system prompt.
    """
    if isinstance(ask.content, str):
        return Ask(_reversed(ask.content), ask.max_tokens)
    *before, last = ask.content
    said = last.get("content")
    last = last | {"content": _reversed(said)} if isinstance(said, str) else last
    return Ask([*before, last], ask.max_tokens)


def _reversed(text: str) -> str:
    return " ".join(reversed(text.split(" ")))


def _ask(place: str, line: str, settings: Settings, source: random.Random) -> Ask:
    try:
        read = msgspec.json.decode(line, type=_Line | str)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"flag --prompts: {place}: {error}.") from None
    told = _Line(prompt=read) if isinstance(read, str) else read
    content: str | list[dict[str, Any]] | None = told.prompt or told.messages
    if not content:
        raise ConfigError(f"flag --prompts: {place} has neither prompt nor messages.")
    if isinstance(content, list) and settings.api == "completions":
        raise ConfigError(f"flag --prompts: {place}: messages need --api chat.")
    return Ask(content, told.max_tokens or settings.output.draw(source))
