"""What a worker is opened with: the configured model, the file it became, the engine for it."""

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
"""Called with what is being done, how much of it is done, and of how much (0: unknown)."""


_REMOTE_ROLES = ("system", "developer", "user", "assistant")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose source has been resolved; all that a process needs to load it.

    `memory` is how many bytes of its device models may take together; None is all that it has.
    """

    model: ModelSpec
    file: ModelFile
    engine: str
    engine_reason: str = ""
    memory: int | None = None


def open_request(found: WorkerSpec) -> OpenRequest:
    """Return what the engine is opened with."""
    spec = found.model
    return OpenRequest(
        model=found.file,
        device=spec.device or "auto",
        context_length=spec.context_length,
        max_running=spec.max_running,
        memory=found.memory,
        repeatable=spec.continuation == "exact",
        trust_remote_code=spec.trust_remote_code,
        task=spec.task or found.file.task,
        options=spec.options,
    )


Resolve = Callable[[ModelSpec, OnProgress], WorkerSpec]
"""Finds the file (downloads it if need be), checks its header, chooses the engine. Blocking."""


async def resolved(resolve: Resolve, spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
    """Resolve on a thread. When the caller is cancelled, the thread gives up at its next progress.

    Raises:
        HeadraceError: what `resolve` raises.
    """
    gone = threading.Event()

    def report(what: str, done: int, total: int) -> None:
        if gone.is_set():
            raise Draining("Loading was given up.")
        on_progress(what, done, total)

    try:
        return await asyncio.to_thread(resolve, spec, report)
    except asyncio.CancelledError:
        gone.set()
        raise


def unloaded_info(
    spec: ModelSpec, state: State, reason: str | None, found: WorkerSpec | None = None
) -> ModelInfo:
    """Return the metadata of a model that is not loaded."""
    file = found.file if found else ModelFile(path="", format="none")
    return ModelInfo(
        id=spec.name,
        source=spec.model,
        aliases=spec.aliases,
        engine=found.engine if found else spec.engine or "auto",
        engine_reason=found.engine_reason if found else "",
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


def loaded_info(found: WorkerSpec, facts: EngineFacts, prompter: Prompter) -> ModelInfo:
    """Return the metadata of a model that an engine has loaded."""
    template = prompter.template if "generate" in facts.capabilities.tasks else None
    wanted = found.model.max_running or facts.max_running
    return msgspec.structs.replace(
        unloaded_info(found.model, "ready", None, found),
        device=facts.device,
        context_length=facts.context_length,
        max_running=min(wanted, facts.max_running),
        capabilities=msgspec.structs.replace(facts.capabilities, chat=template is not None),
        chat_template=template.source if template else None,
        roles=prompter.roles if template else (),
        notes=(*facts.notes, prompter.note) if prompter.note else facts.notes,
    )


def remote_info(found: WorkerSpec, facts: EngineFacts) -> ModelInfo:
    """Return the metadata of a model that an upstream has."""
    return msgspec.structs.replace(
        unloaded_info(found.model, "ready", None, found),
        device=facts.device,
        context_length=facts.context_length or None,
        max_running=facts.max_running,
        capabilities=facts.capabilities,
        roles=_REMOTE_ROLES if facts.capabilities.chat else (),
        notes=facts.notes,
    )
