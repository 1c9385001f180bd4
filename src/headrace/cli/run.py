"""`headrace run`: one answer from arguments or stdin, or a chat."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
from typer import Argument, Option

from headrace.cli import remote, streams, terminal
from headrace.cli.common import Common, ModelFlags, Url, given, known_models
from headrace.core.errors import ConfigError, GenerationFailed, InvalidRequest
from headrace.core.events import Delta, Finish
from headrace.core.media import MAX_IMAGE_BYTES
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import Message
from headrace.core.sampling import Sampling, SamplingFields

if TYPE_CHECKING:
    from headrace.cli.answer import Shown
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.model_worker import AsyncModelWorker


class SamplingFlags(SamplingFields, frozen=True, kw_only=True):
    """How tokens are chosen: a flag for each sampling parameter; None is not given."""

    stop: Annotated[list[str] | None, Option(help="End before this text; may be repeated.")] = None
    ignore_eos: Annotated[bool | None, Option(help="Go on after the end token.")] = None

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that were given.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        chosen = given(self)
        if self.stop:
            chosen["stop"] = tuple(self.stop)
        Sampling(**chosen)
        return chosen


@dataclass(frozen=True)
class FormFlags:
    """What the answer has to be; None is not given."""

    json_schema: Annotated[
        Path | None, Option(metavar="FILE", help="Answer in JSON that this schema accepts.")
    ] = None
    regex: Annotated[str | None, Option(help="The whole answer matches this regex.")] = None
    choice: Annotated[
        list[str] | None, Option(help="The answer is one of these texts; may be repeated.")
    ] = None
    grammar: Annotated[
        Path | None, Option(metavar="FILE", help="The answer is of this grammar: Lark or GBNF.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `AsyncModelWorker.generate`.

        Raises:
            ConfigError: a file cannot be read.
        """
        wanted = given(self)
        if self.json_schema is not None:
            try:
                wanted["json_schema"] = msgspec.json.decode(_read(self.json_schema), type=dict)
            except (msgspec.DecodeError, UnicodeError) as error:
                raise ConfigError(f"{self.json_schema} is not a JSON schema: {error}") from error
        if self.grammar is not None:
            wanted["grammar"] = _read(self.grammar)
        return wanted


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


Images = Annotated[
    list[Path] | None, Option(help="Image file that goes with the prompt; may be repeated.")
]
Sounds = Annotated[
    list[Path] | None,
    Option(help="Sound (WAV, MP3, FLAC) that goes with the prompt; may be repeated."),
]


def run(
    common: Common,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="Model; by default the configuration's default_model.",
            autocompletion=known_models,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        Argument(metavar="PROMPT", help="The prompt; a piped stdin is added."),
    ] = None,
    system: Annotated[str | None, Option(help="System message.")] = None,
    think: Annotated[
        str | None, Option(help="Thinking: on, off, or how much: low, medium, high.")
    ] = None,
    image: Images = None,
    audio: Sounds = None,
    raw: Annotated[bool, Option(help="Send the prompt without chat template.")] = False,
    figures: Annotated[bool, Option(help="Print the figures of the answer.")] = True,
    local: Annotated[bool, Option("--local", help="Load the model in this process.")] = False,
    url: Url = None,
    *,
    sampling: SamplingFlags,
    form: FormFlags,
    flags: ModelFlags,
) -> None:
    """Answer one prompt, or chat if no prompt is given.

    A running service that has the model answers; otherwise the model is loaded for this command.
    With --url any server with OpenAI's API answers.
    """
    settings = flags.settings(common)
    parameters = sampling.parameters() | form.arguments() | ({"thinking": think} if think else {})
    media = [*_parts("image", image), *_parts("audio", audio)]
    question = _Question(_text(prompt or []), system, parameters, raw, media)
    here = _loads_here(flags, url, local=local)
    spec = None if here else remote.served(settings, model, url)
    name = model or settings.config.default_model
    spec = spec or settings.model_spec(name)
    asyncio.run(_run(common, settings, spec, question, name=name, figures=figures))


def _loads_here(flags: ModelFlags, url: str | None, *, local: bool) -> bool:
    """Whether the flags are for a model in this process; they are refused with --url."""
    named = ["--local"] if local else [f"--{name.replace('_', '-')}" for name in given(flags)]
    if url and named:
        raise ConfigError(f"flag {named[0]} is for a model that is loaded here, not at --url.")
    return bool(named)


@dataclass(frozen=True)
class _Question:
    """The request of the command line; without `text`, a chat begins."""

    text: str | None
    system: str | None
    sampling: dict[str, Any]
    raw: bool
    media: Sequence[dict[str, Any]] = ()

    def request(self) -> dict[str, Any]:
        """Return the arguments of `AsyncModelWorker.generate`."""
        if self.raw:
            if self.system or self.media:
                flag = "--system" if self.system else "--image or --audio"
                raise InvalidRequest(f"{flag} needs the chat template that --raw leaves out.")
            return {"prompt": self.text, **self.sampling}
        messages = [Message("system", self.system)] if self.system else []
        user: Message | dict[str, Any] = Message("user", self.text or "")
        if self.media:
            user = {"role": "user", "content": [*self.media, {"type": "text", "text": self.text}]}
        return {"messages": [*messages, user], **self.sampling}


def _parts(kind: Literal["image", "audio"], paths: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Return files as parts of a message, by data: URLs."""
    return [{"type": f"{kind}_url", f"{kind}_url": _url(kind, path)} for path in paths or ()]


def _url(kind: str, path: Path) -> str:
    """Return a file as a data: URL.

    Raises:
        InvalidRequest: it cannot be read, or is too large.
    """
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, RuntimeError) as error:
        raise InvalidRequest(f"--{kind} {path}: {error}.") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequest(f"--{kind} {path}: more than {MAX_IMAGE_BYTES} bytes.")
    return f"data:;base64,{base64.b64encode(data).decode()}"


def _text(words: Sequence[str]) -> str | None:
    """Join the arguments and piped input; None if there is neither.

    Raises:
        InvalidRequest: it is not text.
    """
    typed = " ".join(words)
    if not typed.isascii() and any("\ud800" <= sign <= "\udfff" for sign in typed):
        raise InvalidRequest("The prompt is not text in UTF-8.")
    piped = "" if streams.is_terminal() else streams.piped()
    return "\n\n".join(part for part in (typed, piped.strip("\r\n")) if part) or None


async def _run(
    common: Common,
    settings: Settings,
    spec: ModelSpec,
    question: _Question,
    *,
    name: str,
    figures: bool,
) -> None:
    if question.text is None:
        if common.as_json or question.raw or question.media or not streams.is_terminal():
            raise InvalidRequest("There is no prompt: give one as an argument or on stdin.")
        sampling = question.sampling
        await chat(
            settings, spec, name=name, system=question.system, sampling=sampling, figures=figures
        )
        return
    request = question.request()
    async with loaded(settings, spec, name) as worker:
        if common.as_json:
            terminal.print_json(await _as_json(worker, spec, request))
            return
        finish = await written(worker, request, shown=_shown(question))
    if common.verbose:
        terminal.note("\n".join(all_figures(finish.metrics)))
    elif figures:
        terminal.note(summary(finish) + _place(spec))


def _shown(question: _Question) -> Shown:
    """Return how one answer is shown: formatted on a terminal, unless it continues a raw text."""
    if question.raw or not sys.stdout.isatty():
        return terminal.plain
    from headrace.cli.answer import for_chat

    return for_chat()


def _place(spec: ModelSpec, word: str = ", from") -> str:
    """Return where a model of a running service is; nothing for one that is loaded here."""
    url = spec.options.get("base_url") if spec.model.startswith("headrace:") else None
    return f"{word} {str(url).removesuffix('/v1')}" if url else ""


async def chat(
    settings: Settings,
    spec: ModelSpec,
    *,
    name: str = "",
    system: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    figures: bool = True,
) -> None:
    """Load a model and chat with it until the user leaves."""
    from headrace.cli.answer import for_chat
    from headrace.cli.chat import Chat, Conversation

    shown = for_chat()
    title = (name if name in spec.names else spec.name) + _place(spec, " at")
    options = dict(sampling or {})
    thinking = options.pop("thinking", None)
    conversation = Conversation(title, system=system, sampling=options, thinking=thinking)
    async with loaded(settings, spec, name) as worker:

        async def answer(parts: list[str]) -> str:
            return summary(await written(worker, conversation.request(), parts, shown))

        history = settings.config.home / "chat_history"
        await Chat(conversation, answer, history, figures=figures).run()


async def _as_json(
    worker: AsyncModelWorker, spec: ModelSpec, request: dict[str, Any]
) -> dict[str, Any]:
    result = await worker.generate(**request)
    choice = result.choices[0]
    return {
        "model": spec.name,
        "text": choice.text,
        "reasoning": choice.reasoning,
        "finish_reason": choice.finish_reason,
        "usage": result.usage,
        # The model was loaded for this request, before it was sent.
        "metrics": msgspec.structs.replace(
            result.metrics, load_ms=worker.metadata.load_ms or result.metrics.load_ms
        ),
    }


@contextlib.asynccontextmanager
async def loaded(
    settings: Settings, spec: ModelSpec, name: str = ""
) -> AsyncGenerator[AsyncModelWorker]:
    """Yield a worker that is ready, for one of the names of its model.

    On a terminal the progress of download and load is shown.
    """
    from headrace.model_worker import AsyncModelWorker

    with contextlib.ExitStack() as bar:
        report = bar.enter_context(terminal.progress())
        worker = AsyncModelWorker.from_spec(
            spec, name=name, config=settings.config, on_progress=report
        )
        async with contextlib.aclosing(worker):
            await worker.start()
            bar.close()
            yield worker


async def written(
    worker: AsyncModelWorker,
    request: Mapping[str, Any],
    parts: list[str] | None = None,
    shown: Shown = terminal.plain,
) -> Finish:
    """Write an answer to stdout piece by piece, and append each to `parts`.

    Raises:
        HeadraceError: the stream failed; the text before that has been written.
    """
    stream = worker.generate_stream(**request)
    parts = [] if parts is None else parts
    with shown() as write:
        try:
            async for event in stream:
                if isinstance(event, Delta):
                    if event.reasoning:
                        write(event.reasoning, thinking=True)
                    if event.text:
                        parts.append(event.text)
                        write(event.text)
                elif isinstance(event, Finish):
                    return event
        finally:
            await stream.aclose()
    raise GenerationFailed("The stream ended without a Finish.")


def summary(finish: Finish) -> str:
    """Return the figures of an answer in one line."""
    metrics, usage = finish.metrics, finish.usage
    speed, first = metrics.decode_tokens_per_second, metrics.time_to_first_token_ms
    parts = [
        f"{usage.completion_tokens} tokens",
        f"{speed:.1f} tok/s" if speed is not None else None,
        f"first token {first:.0f} ms" if first is not None else None,
        f"prompt {usage.prompt_tokens} tokens"
        + (f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""),
        f"total {metrics.total_ms / 1000:.2f} s",
        finish.finish_reason,
    ]
    return ", ".join(part for part in parts if part)


def all_figures(metrics: InferenceMetrics) -> Iterator[str]:
    """Yield every figure on a line, by its documented name."""
    plain: dict[str, Any] = msgspec.to_builtins(metrics)
    plain["usage"]["total_tokens"] = metrics.usage.total_tokens
    plain["devices"] = {
        use.name: f"{terminal.size(use.worker_peak)} at most, of {terminal.size(use.total)}"
        for use in metrics.devices
    }
    for name, value in plain.items():
        inner = cast("dict[str, Any]", value) if isinstance(value, dict) else {"": value}
        for part, figure in inner.items():
            shown = f"{figure:.2f}" if isinstance(figure, float) else figure
            yield f"{f'{name}.{part}'.rstrip('.')}: {shown}"
