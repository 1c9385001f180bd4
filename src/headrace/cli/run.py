"""`headrace run`: one answer from arguments or stdin, or a chat."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import answer, terminal
from headrace.cli.common import Common, ModelFlags, given, known_models
from headrace.core.errors import InvalidRequest
from headrace.core.request import Message
from headrace.core.sampling import Sampling, SamplingFields

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec


class SamplingFlags(SamplingFields, frozen=True, kw_only=True):
    """How tokens are chosen: a flag for each sampling parameter; None is not given."""

    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None
    ignore_eos: Annotated[bool | None, typer.Option(help="Go on after the end token.")] = None

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
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option(help="Give the prompt without chat template.")] = False,
    figures: Annotated[bool, typer.Option(help="Print the figures of the answer.")] = True,
    *,
    sampling: SamplingFlags,
    flags: ModelFlags,
) -> None:
    """Ask a model once, or chat with it when no prompt is given."""
    settings = flags.settings(common)
    spec = settings.model_spec(model or settings.config.default_model)
    question = _Question(_text(prompt or []), system, sampling.parameters(), raw)
    asyncio.run(_run(common, settings, spec, question, figures=figures))


@dataclass(frozen=True)
class _Question:
    """What is asked on the command line; without `text`, a chat begins."""

    text: str | None
    system: str | None
    sampling: dict[str, Any]
    raw: bool

    def request(self) -> dict[str, Any]:
        """Return the arguments of `AsyncModelWorker.generate`."""
        if self.raw:
            if self.system:
                raise InvalidRequest("--system needs the chat template that --raw leaves out.")
            return {"prompt": self.text, **self.sampling}
        messages = [Message("system", self.system)] if self.system else []
        return {"messages": [*messages, Message("user", self.text or "")], **self.sampling}


def _interactive() -> bool:
    return not sys.stdin.closed and sys.stdin.isatty()


def _text(words: Sequence[str]) -> str | None:
    """Join the arguments and piped input; None if there is neither."""
    typed = " ".join(words)
    piped = "" if _interactive() or sys.stdin.closed else sys.stdin.read()
    return "\n\n".join(part for part in (typed, piped.strip("\n")) if part) or None


async def _run(
    common: Common, settings: Settings, spec: ModelSpec, question: _Question, *, figures: bool
) -> None:
    if question.text is None:
        if common.as_json or question.raw or not _interactive():
            raise InvalidRequest("Nothing is asked: give a prompt as argument or on stdin.")
        from headrace.cli import chat

        sampling = question.sampling
        await chat.chat(settings, spec, system=question.system, sampling=sampling, figures=figures)
    elif common.as_json:
        await _answer_json(settings, spec, question.request())
    else:
        request = question.request()
        async with answer.loaded(settings, spec) as worker:
            finish = await answer.written(worker, request)
        if common.verbose:
            terminal.note("\n".join(answer.figures(finish.metrics)))
        elif figures:
            terminal.note(answer.summary(finish))


async def _answer_json(settings: Settings, spec: ModelSpec, request: dict[str, Any]) -> None:
    async with answer.loaded(settings, spec) as worker:
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
