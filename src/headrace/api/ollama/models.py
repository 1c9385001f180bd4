"""Ollama's routes for models: tags, show, ps, version and pull; what is not offered is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import msgspec

from headrace.api import fields
from headrace.api.exchange import Exchange, Service
from headrace.api.fields import Peers
from headrace.api.ollama.wire import Addressed, core_name, digest, tagged, timestamp
from headrace.api.problems import OLLAMA
from headrace.api.status import described
from headrace.api.stream import encode
from headrace.core.errors import UnknownModel, Unsupported
from headrace.core.model import ModelInfo
from headrace.core.status import ModelStatus

VERSION = "0.14.0"
"""Of the API that is spoken here: clients ask for a least one."""

_LINES = ((b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache"))
_NEVER = "2318-01-01T00:00:00Z"
_POLL_S = 0.25
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


class ModelDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is; empty where it is not known before the model is loaded."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class TaggedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served; `size` is bytes."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class TaggedModels(msgspec.Struct, frozen=True):
    """All models that are served, each also under its aliases."""

    models: list[TaggedModel]


class ShowRequest(Addressed, frozen=True, kw_only=True):
    """A model to be described."""

    verbose: bool | None = None

    peers: ClassVar[Peers] = fields.OLLAMA


class ShownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model. Clients go by `capabilities` and by the context length in `model_info`."""

    license: str = ""
    modelfile: str = ""
    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model; sizes are bytes."""

    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: ModelDetails
    expires_at: str
    context_length: int | None


class RunningModels(msgspec.Struct, frozen=True):
    """The models that are loaded."""

    models: list[RunningModel]


class Version(msgspec.Struct, frozen=True):
    """The version of the API."""

    version: str


class PullRequest(Addressed, frozen=True, kw_only=True):
    """A model to be fetched, loaded and served."""

    stream: bool | None = None

    peers: ClassVar[Peers] = fields.OLLAMA


class PullLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state of a pull; `completed` of `total` bytes."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


_SHOW = msgspec.json.Decoder(ShowRequest)
_PULL = msgspec.json.Decoder(PullRequest)


async def tags(service: Service, exchange: Exchange) -> None:
    """List the models that are served, as Ollama does."""
    models = [
        _tagged(name, info)
        for info in await described(service, exchange.call)
        for name in (info.id, *info.aliases)
    ]
    await exchange.answer(TaggedModels(models))


async def show(service: Service, exchange: Exchange) -> None:
    """Describe one model, as Ollama does."""
    wire = await exchange.read(_SHOW)
    name = core_name(service, wire)
    for info in await described(service, exchange.call, name):
        if name == info.id or name in info.aliases:
            await exchange.answer(_shown(info))
            return
    raise UnknownModel("No model of this name is served here.")


async def ps(service: Service, exchange: Exchange) -> None:
    """List the loaded models, as Ollama does."""
    infos = {info.id: info for info in service.models(exchange.call)}
    statuses = service.admin.status().models if service.admin else ()
    running = [
        _running(model, infos[model.id])
        for model in statuses
        if model.id in infos and (model.memory or model.state == "ready")
    ]
    await exchange.answer(RunningModels(running))


async def version(_service: Service, exchange: Exchange) -> None:
    """Return the version of Ollama's API that is spoken here."""
    await exchange.answer(Version(VERSION))


async def pull(service: Service, exchange: Exchange) -> None:
    """Fetch and load a model, and serve it from then on."""
    wire = await exchange.read(_PULL)
    name = core_name(service, wire)
    assert service.admin is not None
    if wire.stream is False:
        await service.admin.load(name)
        await exchange.answer(PullLine(status="success"))
        return
    await exchange.start(200, _LINES)
    lines = _progress(service, exchange, name)
    try:
        async for line in lines:
            await exchange.send({"type": "http.response.body", "body": line, "more_body": True})
    finally:
        await lines.aclose()
    await exchange.send({"type": "http.response.body", "body": b""})


async def refused(_service: Service, exchange: Exchange) -> None:
    """Refuse what is not offered here."""
    path: str = exchange.scope["path"]
    raise Unsupported(
        f"{path} is not offered by Headrace: models are set up in its configuration, and fetched "
        "by `headrace pull`."
    )


async def _progress(service: Service, exchange: Exchange, name: str) -> AsyncGenerator[bytes]:
    """Yield the states of a load; it goes on if the client leaves."""
    assert service.admin is not None
    yield _line(PullLine(status="pulling manifest"))
    before = {model.id for model in service.admin.status().models}
    loading = asyncio.ensure_future(service.admin.load(name))
    last = b""
    while not (await asyncio.wait({loading}, timeout=_POLL_S))[0]:
        models = service.admin.status().models
        # A reference is added under a name of its own.
        here = (m for m in models if name in (m.id, m.source, *m.aliases) or m.id not in before)
        model = next(here, None)
        line = _line(_state(name, model)) if model and model.progress else last
        if line != last:
            last = line
            yield line
    if isinstance(error := loading.exception(), Exception):
        yield OLLAMA.write(exchange.problem(error), exchange.call.id) + b"\n"
    else:
        yield _line(PullLine(status="success"))


def _state(name: str, status: ModelStatus) -> PullLine:
    return PullLine(
        status=f"{status.progress} {name}",
        digest=f"sha256:{digest(status.source)}",
        total=status.total,
        completed=status.done,
    )


def _line(line: PullLine) -> bytes:
    return encode(line) + b"\n"


def _details(info: ModelInfo) -> ModelDetails:
    family = info.architecture or ""
    return ModelDetails(
        format=info.format,
        family=family,
        families=[family] if family else [],
        parameter_size=_count(info.parameters),
        quantization_level=info.quantization or "",
    )


def _tagged(name: str, info: ModelInfo) -> TaggedModel:
    return TaggedModel(
        name=tagged(name),
        model=tagged(name),
        modified_at=timestamp(info.created),
        size=info.size,
        digest=_digest(info),
        details=_details(info),
    )


def _running(status: ModelStatus, info: ModelInfo) -> RunningModel:
    size, until = sum(status.memory.values()), status.until
    return RunningModel(
        name=tagged(status.id),
        model=tagged(status.id),
        size=size,
        size_vram=size - status.memory.get("cpu", 0),
        digest=_digest(info),
        details=_details(info),
        expires_at=_NEVER if until is None else timestamp(until),
        context_length=status.context_length,
    )


def _shown(info: ModelInfo) -> ShownModel:
    family = info.architecture or "unknown"
    facts = {"context_length": info.context_length}
    if info.capabilities.dimensions:
        facts["embedding_length"] = info.capabilities.dimensions
    known = {f"{family}.{name}": value for name, value in facts.items() if value}
    general = {
        "general.architecture": family,
        "general.basename": info.id,
        "general.parameter_count": info.parameters or 0,
    }
    return ShownModel(
        parameters=f"num_ctx {info.context_length}" if info.context_length else "",
        template=info.chat_template or "",
        details=_details(info),
        model_info=general | known,
        capabilities=_capabilities(info),
        modified_at=timestamp(info.created),
    )


def _capabilities(info: ModelInfo) -> list[str]:
    """Return what a model can do, as Ollama names it.

    One of which nothing is known yet is taken for one with tools: most can, by their own template
    or by a general form.
    """
    names = ["embedding"] if "embed" in info.capabilities.tasks else []
    if "generate" in info.capabilities.tasks:
        names.append("completion")
        is_unknown = info.state != "ready" and info.format == "none"
        if info.capabilities.chat or info.chat_template or is_unknown:
            names.append("tools")
        if info.capabilities.infill:
            names.append("insert")
        if info.capabilities.vision:
            names.append("vision")
        if info.capabilities.thinking != "none":
            names.append("thinking")
    return names


def _digest(info: ModelInfo) -> str:
    return digest(info.source, info.size, info.quantization)


def _count(parameters: int | None) -> str:
    """Return a number as in `134.5M`."""
    for unit, letter in _UNITS:
        if parameters and parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters or "")
