"""`headrace trace replay`: send a recorded request to a running service again."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from typer import Option

from headrace.cli import terminal
from headrace.cli.common import Common, Url, known_models, with_common
from headrace.cli.replay_body import PATHS, replay_body
from headrace.cli.trace import Id, app, find, rate, tokens, took
from headrace.core.errors import InvalidRequest, UpstreamError
from headrace.core.metrics import InferenceMetrics
from headrace.core.record import RequestRecord
from headrace.telemetry.content import REDACTED
from headrace.text import chunks

if TYPE_CHECKING:
    from headrace.cli.client import Client


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """The new answer, by choice, as records have it.

    `differs_at` is the first character that differs.
    """

    id: str
    model: str
    answered: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    metrics: InferenceMetrics
    equal: bool
    differs_at: int | None


def replay(
    common: Common,
    id: Id,
    model: Annotated[
        str | None, Option(help="Send it to this model.", autocompletion=known_models)
    ] = None,
    image: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="An image or a sound of the request: records keep neither."),
    ] = None,
    url: Url = None,
) -> None:
    """Send a recorded request again, print the answer, and compare the figures.

    It needs a record with content: the service keeps it with telemetry.trace_content. Tools,
    thinking and the form of the answer are sent too.
    """
    record = find(common, id)
    body = replay_body(record, model, [*map(_read, image or ())])
    answer = _Answer(write=not common.as_json)

    async def read(client: Client) -> None:
        stream = client.stream("POST", PATHS[record.operation], chunks.read, body)
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                answer.take(chunk)

    common.ask(url, read)
    replayed = answer.end(record, body.get("model", ""))
    if common.as_json:
        terminal.print_json(replayed)
        return
    for line in _lines(record, replayed):
        terminal.note(line)
    if REDACTED in msgspec.json.encode(body).decode():
        terminal.note("The request is not quite the same: parts of the record are redacted.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"--image {path}: {error.strerror}.", param="image") from None


class _Answer:
    """The chunks so far; with `write`, the text of the first choice is written at once."""

    def __init__(self, *, write: bool) -> None:
        self._writes = write
        self._metrics: dict[str, Any] | None = None
        self._texts: dict[int, str] = defaultdict(str)
        self._reasons: dict[int, str] = {}

    def take(self, chunk: chunks.Chunk) -> None:
        """Add a chunk.

        Raises:
            UpstreamError: it is the error of an answer that failed.
        """
        if chunk.error:
            from headrace.engines.remote import parse_error

            raise UpstreamError(parse_error({"error": chunk.error}).message)
        self._metrics = chunk.metrics or self._metrics
        for choice in chunk.choices or ():
            index = int(choice.index or 0)
            text = choice.content + "".join(choice.calls)
            self._texts[index] += text
            if choice.finish_reason:
                self._reasons[index] = choice.finish_reason
            if index == 0:
                self._write(text)

    def _write(self, text: str) -> None:
        if self._writes:
            terminal.write(text)

    def end(self, record: RequestRecord, model: str) -> Replayed:
        """Write the other choices, and compare all with the recorded answer.

        Raises:
            UpstreamError: the answer was cut off.
        """
        texts = tuple(text for _, text in sorted(self._texts.items()))
        for number, text in enumerate(texts[1:], 2):
            self._write(f"\n\n{number}: {text}")
        self._write("\n")
        try:
            metrics = msgspec.convert(self._metrics, InferenceMetrics)
        except msgspec.ValidationError:
            raise UpstreamError("The answer ended without its figures.") from None
        before = record.content.answered if record.content else ()
        return Replayed(
            id=record.id,
            model=model,
            answered=texts,
            finish_reasons=tuple(reason for _, reason in sorted(self._reasons.items())),
            metrics=metrics,
            equal=before == texts,
            differs_at=_difference(before, texts),
        )


def _difference(before: Sequence[str], after: Sequence[str]) -> int | None:
    for old, new in zip(before, after, strict=False):
        for place, pair in enumerate(zip_longest(old, new)):
            if pair[0] != pair[1]:
                return place
    return None


def _lines(record: RequestRecord, replayed: Replayed) -> Iterator[str]:
    """Yield each figure with its value then and now, and whether the texts are equal."""
    then, now = record.metrics, replayed.metrics
    speeds = then.decode_tokens_per_second, now.decode_tokens_per_second
    firsts = then.time_to_first_token_ms, now.time_to_first_token_ms
    heads = ("FIGURE", "THEN", "NOW")
    rows = [
        ("model", record.model, replayed.model),
        ("ttft", *map(took, firsts)),
        ("tokens/s", *map(rate, speeds)),
        ("total", took(then.total_ms), took(now.total_ms)),
        ("tokens", tokens(then), tokens(now)),
        ("finish", *(", ".join(side.finish_reasons) or None for side in (record, replayed))),
    ]
    yield from terminal.aligned(heads, rows, heads[1:])
    place = "" if replayed.differs_at is None else f" from character {replayed.differs_at} on"
    yield "The text is equal." if replayed.equal else f"The text is another{place}."


app.command("replay")(with_common(replay))
