"""WorkerSpec: the model, its file and its engine; and the metadata made of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import msgspec

from headrace.core.errors import Draining
from headrace.core.model import Capabilities, ModelFile, ModelInfo, ModelSpec, State
from headrace.core.values import masked_options
from headrace.engines.base import EngineFacts, OpenRequest
from headrace.worker.prompt import Prompter

OnProgress = Callable[[str, int, int], None]
"""Called with the stage of a load, and how much of how much is done (0: unknown)."""

_REMOTE_ROLES = ("system", "developer", "user", "assistant")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose source has been resolved: everything that a process needs to load it.

    `memory` is the budget of all models on its device in bytes; None is the whole device.
    `import_from` is the folder of an engine that is given by its import path.
    """

    model: ModelSpec
    file: ModelFile
    engine: str
    engine_reason: str = ""
    memory: int | None = None
    import_from: str | None = None


def open_request(worker_spec: WorkerSpec) -> OpenRequest:
    """Return the arguments for opening the engine."""
    spec = worker_spec.model
    return OpenRequest(
        model=worker_spec.file,
        device=spec.device or "auto",
        context_length=spec.context_length,
        max_running=spec.max_running,
        memory=worker_spec.memory,
        repeatable=spec.continuation == "exact",
        trust_remote_code=spec.trust_remote_code,
        task=spec.task or worker_spec.file.task,
        options=spec.options,
    )


Resolve = Callable[[ModelSpec, OnProgress], WorkerSpec]
"""Finds the file (downloads it if needed), checks its header, chooses the engine. Blocking."""


async def resolved(resolve: Resolve, spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
    """Resolve on a thread. After a cancellation the thread stops at its next progress report.

    Raises:
        HeadraceError: what `resolve` raises.
    """
    is_cancelled = threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        if is_cancelled.is_set():
            raise Draining("Loading was given up.")
        on_progress(stage, done, total)

    try:
        return await asyncio.to_thread(resolve, spec, report)
    except asyncio.CancelledError:
        is_cancelled.set()
        raise


def unloaded_info(
    spec: ModelSpec, state: State, reason: str | None, worker_spec: WorkerSpec | None = None
) -> ModelInfo:
    """Return the metadata of a model that is not loaded."""
    file = worker_spec.file if worker_spec else ModelFile(path="", format="none")
    return ModelInfo(
        id=spec.name,
        source=spec.model,
        aliases=spec.aliases,
        engine=worker_spec.engine if worker_spec else spec.engine or "auto",
        engine_reason=worker_spec.engine_reason if worker_spec else "",
        state=state,
        reason=reason,
        device=spec.device or "auto",
        format=file.format,
        architecture=file.architecture,
        parameters=file.parameters,
        quantization=file.quantization,
        size=file.size,
        context_length=spec.context_length or file.context_length,
        chat_template=spec.chat_template or file.chat_template,
        max_running=spec.max_running,
        capabilities=Capabilities(tasks=frozenset({spec.task or file.task})),
        options=masked_options(spec.options),
    )


def loaded_info(worker_spec: WorkerSpec, facts: EngineFacts, prompter: Prompter) -> ModelInfo:
    """Return the metadata of a model that an engine has loaded."""
    template = prompter.template if "generate" in facts.capabilities.tasks else None
    wanted = worker_spec.model.max_running or facts.max_running
    return msgspec.structs.replace(
        unloaded_info(worker_spec.model, "ready", None, worker_spec),
        device=facts.device,
        context_length=facts.context_length,
        max_running=min(wanted, facts.max_running),
        capabilities=msgspec.structs.replace(facts.capabilities, chat=template is not None),
        chat_template=template.source if template else None,
        roles=prompter.roles if template else (),
        notes=(*facts.notes, prompter.note) if prompter.note else facts.notes,
    )


def remote_info(worker_spec: WorkerSpec, facts: EngineFacts) -> ModelInfo:
    """Return the metadata of a model at an upstream."""
    return msgspec.structs.replace(
        unloaded_info(worker_spec.model, "ready", None, worker_spec),
        device=facts.device,
        context_length=facts.context_length or None,
        max_running=facts.max_running,
        capabilities=facts.capabilities,
        roles=_REMOTE_ROLES if facts.capabilities.chat else (),
        notes=facts.notes,
    )
