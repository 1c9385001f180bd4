"""One answer at the terminal: load a model, write its answer as it comes, show its figures."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec

from headrace.cli import terminal
from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta, Finish
from headrace.core.metrics import InferenceMetrics

if TYPE_CHECKING:
    from headrace.config import Settings
    from headrace.core.model import ModelSpec
    from headrace.model_worker import AsyncModelWorker


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


async def written(
    worker: AsyncModelWorker, request: Mapping[str, Any], parts: list[str] | None = None
) -> Finish:
    """Write an answer to stdout as it comes; its text is added to `parts`, however it ends.

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


def figures(metrics: InferenceMetrics) -> Iterator[str]:
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
