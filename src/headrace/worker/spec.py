"""WorkerSpec: the model, its file and its engine; and the metadata made of them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

import msgspec

from headrace.core.adapter import AdapterFile
from headrace.core.device import read_device
from headrace.core.errors import Draining
from headrace.core.model import Capabilities, ModelFile, ModelInfo, ModelSpec, State
from headrace.core.preset import plain
from headrace.core.values import masked_options
from headrace.engines.base import EngineFacts, OpenRequest
from headrace.machine import HOST, host_memory
from headrace.text.calls.format import Format
from headrace.worker.embed_prompts import embed_prompts
from headrace.worker.prompt import Prompter

OnProgress = Callable[[str, int, int], None]
"""Called with the stage of a load, and how much of how much is done (0: unknown)."""

_HEADROOM, _PER_CORE = 4 << 30, 16 << 20
_REMOTE_ROLES = ("system", "developer", "user", "assistant")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose source has been resolved: everything that a process needs to load it.

    `memory` is the budget of all models on its devices in bytes; None is the whole devices.
    `placed` are the devices that were chosen for it, by the names that this process has for them;
    empty leaves them to the engine. `devices` are the names that the service has for its GPUs.
    `booked` is the estimated memory of a model on the host alone.
    `import_from` is the folder of an engine that is given by its import path. `adapters` are
    loaded beside the model. `draft` is the model of the option `draft_model`.
    """

    model: ModelSpec
    file: ModelFile
    draft: ModelFile | None = None
    engine: str
    engine_reason: str = ""
    memory: int | None = None
    placed: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    booked: int | None = None
    import_from: str | None = None
    adapters: tuple[AdapterFile, ...] = ()

    @property
    def memory_limit(self) -> int | None:
        """What the process may allocate at most, in bytes; None for no limit.

        A library for GPUs maps much more than it uses.
        """
        if self.booked is None:
            return None
        stacks = _PER_CORE * (os.cpu_count() or 1)
        return min(2 * self.booked + _HEADROOM + stacks, max(host_memory(), self.booked))

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that were chosen for it."""
        return tuple(device for device in self.placed if device != HOST)

    def service_name(self, device: str) -> str:
        """Return the name that the service has for a device of this process, `cuda:0` or `cuda`."""
        key, space, product = device.partition(" ")
        kind, _, number = key.partition(":")
        if kind != "cuda" or not self.devices:
            return device
        return (self.devices[int(number)] if number else ",".join(self.devices)) + space + product


def localized(worker_spec: WorkerSpec) -> WorkerSpec:
    """Return it for a process that sees the GPUs of its placement and no others."""
    gpus = worker_spec.gpus
    local = tuple(f"cuda:{number}" for number in range(len(gpus))) or worker_spec.placed
    return msgspec.structs.replace(worker_spec, placed=local, devices=gpus)


def open_request(worker_spec: WorkerSpec) -> OpenRequest:
    """Return the arguments for opening the engine."""
    spec = worker_spec.model
    prompts = embed_prompts(spec, worker_spec.file)
    gpus, kind = worker_spec.gpus, read_device(spec.device).kind
    placed = worker_spec.placed[0] if worker_spec.placed else spec.device or "auto"
    return OpenRequest(
        model=worker_spec.file,
        draft=worker_spec.draft,
        # An engine whose library is without CUDA takes the CPU of its own accord.
        device="auto" if kind == "auto" else placed,
        gpus=gpus,
        context_length=spec.context_length,
        max_running=spec.max_running,
        memory=worker_spec.memory,
        repeatable=spec.continuation == "exact",
        trust_remote_code=spec.trust_remote_code,
        task=spec.task or worker_spec.file.task,
        prompt=prompts.text(None, None),
        options=spec.options,
        adapters=worker_spec.adapters,
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
        capabilities=Capabilities(
            tasks=frozenset({spec.task or file.task}),
            infill=bool(file.infill_ids),
            vision=file.vision,
            audio=file.audio,
        ),
        options=masked_options(spec.options),
        preset=plain(spec),
        prompts={**file.prompts, **spec.prompts},
    )


def loaded_info(worker_spec: WorkerSpec, facts: EngineFacts, prompter: Prompter) -> ModelInfo:
    """Return the metadata of a model that an engine has loaded."""
    template = prompter.template if "generate" in facts.capabilities.tasks else None
    wanted = worker_spec.model.max_running or facts.max_running
    info = msgspec.structs.replace(
        unloaded_info(worker_spec.model, "ready", None, worker_spec),
        device=worker_spec.service_name(facts.device),
        context_length=facts.context_length,
        max_running=min(wanted, facts.max_running),
        capabilities=msgspec.structs.replace(
            facts.capabilities,
            chat=template is not None,
            infill=prompter.infill is not None,
        ),
        chat_template=template.source if template else None,
        roles=prompter.roles if template else (),
        notes=(*facts.notes, prompter.note) if prompter.note else facts.notes,
    )
    return (
        info if prompter.chat is None or template is None else described(info, prompter.chat.format)
    )


def described(info: ModelInfo, form: Format) -> ModelInfo:
    """Return the metadata with how the model writes thinking and calls."""
    able = msgspec.structs.replace(info.capabilities, tools=form.tools, thinking=form.thinking)
    return msgspec.structs.replace(info, capabilities=able, tool_format=form.describe())


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
