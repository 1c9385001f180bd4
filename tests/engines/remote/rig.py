"""A remote worker on a fake upstream, without a service around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from headrace.core.model import ModelFile, ModelSpec, Task
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.models.providers import PROVIDERS
from headrace.worker.spec import OnProgress, WorkerSpec
from headrace.worker.worker import Worker

KEY = "sk-very-secret-0123456789"
QUICK: dict[str, Any] = {"first_token_s": 0.6, "stall_s": 0.4, "connect_s": 2}


def worker(
    url: str,
    provider: str = "openai",
    *,
    task: Task = "generate",
    max_running: int | None = None,
    stop: tuple[str, ...] = (),
    name: str = "far",
    **options: Any,
) -> Worker:
    options = {"base_url": url, "api_key": KEY, **options}
    spec = ModelSpec(
        name=name,
        model=f"{provider}:gpt-x",
        task=task,
        max_running=max_running,
        stop=stop,
        options=options,
    )
    file = ModelFile(path="gpt-x", format="remote", provider=provider)

    def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
        del on_progress
        return WorkerSpec(model=spec, file=file, engine=PROVIDERS[provider].engine)

    return Worker(spec, resolve)


@asynccontextmanager
async def started(*args: Any, **more: Any) -> AsyncIterator[Worker]:
    made = worker(*args, **more)
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


def ask(text: str = "Hello?", *, n: int = 1, **more: Any) -> GenerateRequest:
    """A chat; what is no field of the request is one of its sampling."""
    own = {name: more.pop(name) for name in tuple(more) if name in _FIELDS}
    return GenerateRequest(messages=(Message("user", text),), n=n, sampling=Sampling(**more), **own)


_FIELDS = frozenset(GenerateRequest.__struct_fields__)
