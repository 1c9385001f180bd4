"""`headrace run`: one answer from arguments or stdin, or a chat."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from headrace.cli import terminal
from headrace.cli.common import Common, given, known_models, parse_options
from headrace.core.errors import GenerationFailed, InvalidRequest
from headrace.core.events import Delta, Finish
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import Message

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.model_worker import AsyncModelWorker

_MODEL = "Model"


def _sampling(text: str) -> Any:
    return typer.Option(help=text, show_default=False, rich_help_panel="Sampling")


Engine = Annotated[str | None, typer.Option(help="Use this engine.", rich_help_panel=_MODEL)]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.", rich_help_panel=_MODEL)]
ContextLength = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer.", rich_help_panel=_MODEL)
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Option of the engine; `headrace show MODEL` lists them.",
        rich_help_panel=_MODEL,
    ),
]


@dataclass(frozen=True)
class ModelFlags:
    """How a model is to run."""

    engine: Engine = None
    device: Device = None
    context_length: ContextLength = None
    option: Options = None

    def settings(self, common: Common) -> Settings:
        """Read the configuration with these flags on top.

        Raises:
            ConfigError: as `Common.settings` does.
        """
        return common.settings(
            engine=self.engine,
            device=self.device,
            context_length=self.context_length,
            options=parse_options(self.option),
        )


@dataclass(frozen=True)
class _Sampling:
    """How tokens are chosen; None is not given."""

    max_tokens: Annotated[int | None, _sampling("Length of the answer.")] = None
    temperature: Annotated[float | None, _sampling("0 is greedy.")] = None
    top_p: Annotated[float | None, _sampling("Choose among this share of the probability.")] = None
    top_k: Annotated[int | None, _sampling("Choose among this many tokens.")] = None
    min_p: Annotated[float | None, _sampling("Least probability, relative to the best.")] = None
    presence_penalty: Annotated[float | None, _sampling("Against tokens that were used.")] = None
    frequency_penalty: Annotated[float | None, _sampling("Against tokens used often.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Above 1 is against repetition.")] = None
    seed: Annotated[int | None, _sampling("Same seed, same answer.")] = None
    stop: Annotated[list[str] | None, _sampling("End before this text; may be repeated.")] = None
    ignore_eos: Annotated[bool | None, _sampling("Go on after the end token.")] = None


def run(
    common: Common,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Model; the configuration's default_model when left out.",
            autocompletion=known_models,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help="What to ask; stdin is read too when it is piped."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Message of the system.")] = None,
    raw: Annotated[bool, typer.Option(help="Give the prompt without chat template.")] = False,
    figures: Annotated[bool, typer.Option(help="Print the figures of the answer.")] = True,
    *,
    sampling: _Sampling,
    flags: ModelFlags,
) -> None:
    """Ask a model once, or chat with it when nothing is asked."""
    settings = flags.settings(common)
    spec = settings.model_spec(model or settings.config.default_model)
    chosen = given(sampling)
    if sampling.stop:
        chosen["stop"] = tuple(sampling.stop)
    ask = _Ask(_question(prompt or []), system, chosen, raw, figures)
    asyncio.run(_run(common, settings, spec, ask))


@dataclass(frozen=True)
class _Ask:
    """What was asked on the command line."""

    text: str | None
    system: str | None
    sampling: dict[str, Any]
    raw: bool
    figures: bool


async def _run(common: Common, settings: Settings, spec: ModelSpec, ask: _Ask) -> None:
    if ask.text is None:
        if common.as_json or ask.raw or not _interactive():
            raise InvalidRequest("Nothing is asked: give a prompt as argument or on stdin.")
        from headrace.cli import chat

        await chat.chat(
            settings, spec, system=ask.system, sampling=ask.sampling, figures=ask.figures
        )
        return
    what = _request(ask.text, ask.system, raw=ask.raw) | ask.sampling
    if common.as_json:
        await _answer_json(settings, spec, what)
    else:
        await _answer(settings, spec, what, figures=ask.figures, all_figures=common.verbose)


def _interactive() -> bool:
    return not sys.stdin.closed and sys.stdin.isatty()


def _question(words: Sequence[str]) -> str | None:
    """Join the arguments and what is piped in; None where nobody has asked and nobody can."""
    typed = " ".join(words)
    piped = "" if _interactive() or sys.stdin.closed else sys.stdin.read()
    return "\n\n".join(part for part in (typed, piped.strip("\n")) if part) or None


def _request(text: str, system: str | None, *, raw: bool) -> dict[str, Any]:
    if raw:
        if system:
            raise InvalidRequest("--system needs the chat template that --raw leaves out.")
        return {"prompt": text}
    messages = [Message("system", system)] if system else []
    return {"messages": [*messages, Message("user", text)]}


@contextlib.asynccontextmanager
async def loaded(settings: Settings, spec: ModelSpec) -> AsyncGenerator[AsyncModelWorker]:
    """Yield a worker that is ready; fetching and loading show a bar on a terminal."""
    from headrace.model_worker import AsyncModelWorker

    with contextlib.ExitStack() as bar:
        report = bar.enter_context(terminal.progress())
        worker = AsyncModelWorker.from_spec(spec, config=settings.config, on_progress=report)
        async with contextlib.aclosing(worker):
            await worker.start()
            bar.close()
            yield worker


async def _answer_json(settings: Settings, spec: ModelSpec, request: dict[str, Any]) -> None:
    async with loaded(settings, spec) as worker:
        result = await worker.generate(**request)
    choice = result.choices[0]
    terminal.print_json(
        {
            "model": spec.name,
            "text": choice.text,
            "reasoning": choice.reasoning,
            "finish_reason": choice.finish_reason,
            "usage": result.usage,
            "metrics": result.metrics,
        }
    )


async def _answer(
    settings: Settings,
    spec: ModelSpec,
    request: dict[str, Any],
    *,
    figures: bool,
    all_figures: bool | None,
) -> None:
    async with loaded(settings, spec) as worker:
        finish = await written(worker, request)
    if all_figures:
        terminal.note(all_of(finish.metrics))
    elif figures:
        terminal.note(summary(finish))


async def written(
    worker: AsyncModelWorker, request: dict[str, Any], parts: list[str] | None = None
) -> Finish:
    """Write an answer to stdout as it comes; `parts` gets its text, however it ends.

    Raises:
        HeadraceError: whatever the stream raises; what came before it has been written.
    """
    stream = worker.generate_stream(**request)
    parts = [] if parts is None else parts
    try:
        async for event in stream:
            if isinstance(event, Delta) and event.text:
                parts.append(event.text)
                terminal.write(event.text)
            elif isinstance(event, Finish):
                return event
    finally:
        await stream.aclose()
        if parts and not parts[-1].endswith("\n"):
            terminal.write("\n")
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


def all_of(metrics: InferenceMetrics) -> str:
    """Return every figure, one in a line, as design and documentation name them."""
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(metrics)
    plain["usage"]["total_tokens"] = metrics.usage.total_tokens
    plain["devices"] = {
        one.name: f"{terminal.size(one.worker_peak)} at most, of {terminal.size(one.total)}"
        for one in metrics.devices
    }
    lines: list[str] = []
    for name, value in plain.items():
        inner = cast("dict[str, Any]", value) if isinstance(value, dict) else {"": value}
        for part, figure in inner.items():
            shown = f"{figure:.2f}" if isinstance(figure, float) else figure
            lines.append(f"{f'{name}.{part}'.rstrip('.')}: {shown}")
    return "\n".join(lines)
