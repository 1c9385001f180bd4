"""ModelWorker: the blocking interface of AsyncModelWorker."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from headrace.arguments import Messages, Prompt
from headrace.config import Config
from headrace.core.errors import InvalidRequest
from headrace.core.events import Event
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.options import GenerateOptions, ModelOptions
from headrace.core.parameters import Parameter
from headrace.model_worker import AsyncModelWorker
from headrace.worker.spec import OnProgress

T = TypeVar("T")
P = ParamSpec("P")
_SETTLE_S = 5.0


class _Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headrace", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end; an interrupt of the caller cancels the work and waits for its end."""
        tasks: list[asyncio.Task[T]] = []
        done = threading.Event()

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: done.set())

        self._loop.call_soon_threadsafe(begin)
        try:
            done.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            done.wait()
            raise
        return tasks[0].result()

    def close(self) -> None:
        """Wait for the work of other threads, and end the thread."""
        if not self._loop.is_closed():
            self.run(_settled())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def _blocking(
    method: Callable[Concatenate[AsyncModelWorker, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ModelWorker, P], T]:
    """Return a method of the same arguments, result and docstring that waits for its end."""

    @functools.wraps(method)
    def call(self: ModelWorker, *args: P.args, **options: P.kwargs) -> T:
        return self._run(method(self._worker, *args, **options))  # pyright: ignore[reportPrivateUsage]

    return call


class ModelWorker:
    """One model, blocking. Arguments and errors are those of AsyncModelWorker.

    It may be used by any number of threads; a stream belongs to the thread that reads it.
    """

    def __init__(
        self,
        model: str | ModelSpec,
        *,
        config: Config | None = None,
        isolate: bool = True,
        on_progress: OnProgress | None = None,
        **arguments: Unpack[ModelOptions],
    ) -> None:
        self._worker = AsyncModelWorker(
            model, config=config, isolate=isolate, on_progress=on_progress, **arguments
        )
        self._loop: _Loop | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_spec(cls, spec: ModelSpec, **keywords: Any) -> Self:
        """Bind a model by its specification."""
        return cls(spec, **keywords)

    @property
    def state(self) -> State:
        """One of created, loading, ready, draining, stopped, failed."""
        return self._worker.state

    @property
    def metadata(self) -> ModelInfo:
        """The metadata of the model; complete once it is loaded."""
        return self._worker.metadata

    def parameters(self) -> tuple[Parameter, ...]:
        """Describe the settings of the model and the options of its engine, with their values."""
        return self._worker.parameters()

    def __repr__(self) -> str:
        """Describe the name and the state."""
        return f"<ModelWorker {self._worker!r}>"

    def start(self) -> None:
        """Load the model. Idempotent."""
        self._run(self._worker.start())

    def stop(self, drain_s: float = 0.0) -> None:
        """Drain, and release all resources. Idempotent."""
        if self._loop is not None:
            self._own_loop().run(self._worker.stop(drain_s))
            self._loop.close()
            self._loop = None

    def restart(self) -> None:
        """Stop, and load the same model again."""
        self._run(self._worker.restart())

    def close(self) -> None:
        """Stop at once."""
        self.stop()

    def __enter__(self) -> Self:
        """Load the model."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the model."""
        self.close()

    def generate_stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Event]:
        """Yield deltas, then one Finish. Closing the iterator stops the engine."""

        async def begin() -> AsyncGenerator[Event, None]:
            return self._worker.generate_stream(prompt, messages=messages, **options)

        # In the worker's own loop: the caller's thread may be running another one.
        return self._events(self._run(begin()))

    generate = _blocking(AsyncModelWorker.generate)
    embed = _blocking(AsyncModelWorker.embed)
    embed_raw = _blocking(AsyncModelWorker.embed_raw)
    rerank = _blocking(AsyncModelWorker.rerank)
    count_tokens = _blocking(AsyncModelWorker.count_tokens)
    detokenize = _blocking(AsyncModelWorker.detokenize)

    def _events(self, stream: Any) -> Iterator[Event]:
        loop = self._own_loop()
        try:
            while (event := loop.run(_next(stream))) is not None:
                yield event
        finally:
            # A loop that has been closed has closed its streams.
            if self._loop is loop:
                loop.run(stream.aclose())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._own_loop().run(work)

    def _own_loop(self) -> _Loop:
        with self._lock:
            if self._loop is None:
                self._loop = _Loop()
            if self._loop.process != os.getpid():
                raise InvalidRequest(
                    f"{self._worker.spec.name} was started in another process, of which this one "
                    "is a fork; make a ModelWorker in each process."
                )
            return self._loop


async def _next(stream: Any) -> Event | None:
    return await anext(stream, None)


async def _settled() -> None:
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_SETTLE_S)
    await loop.shutdown_default_executor()
