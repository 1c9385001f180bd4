"""DB-GPT's routes for models: what they are, what can be started, and starting and stopping."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal
from urllib.parse import parse_qs

import msgspec

from headrace.api.dbgpt.cluster import Cluster
from headrace.api.dbgpt.wire import WORKER_TYPES, ModelName
from headrace.api.exchange import Exchange, Service
from headrace.core.errors import ConfigError, HeadraceError, InvalidRequest
from headrace.core.model import SETTINGS, ModelInfo

_PARAMETERS = {
    "context_length": "int",
    "max_running": "int",
    "max_queued": "int",
    "keep_alive": "str",
}
"""The settings of a model that DB-GPT can change when it starts one, with their types."""

# Python makes a class of the list: its module has to be importable there, and it must not exist.
_CLASS = "dbgpt.core.interface.parameter.HeadraceDeployModelParameters"
_DEFAULT_CONTEXT = 4096


class ModelMetadataRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be described."""

    model: ModelName


class ModelExtraMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The roles that a conversation may have."""

    prompt_roles: tuple[str, ...] = ("human", "ai", "system")
    prompt_sep: str = "\n"
    prompt_chat_template: str | None = None


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A model, with exactly the fields that clients know."""

    model: str
    label: str
    context_length: int
    max_output_length: int
    description: str
    link: str = ""
    chat_model: bool
    function_calling: bool
    metadata: dict[str, Any] = {}
    ext_metadata: ModelExtraMetadata = ModelExtraMetadata()


class ParameterDescription(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that a model can be started with."""

    required: bool = False
    is_array: bool = False
    param_name: str
    param_class: str = _CLASS
    param_type: str
    label: str
    description: str
    default_value: Any = None
    valid_values: list[Any] | None = None
    ext_metadata: dict[str, Any] = {}
    nested_fields: dict[str, Any] | None = None
    param_order: int


class SupportedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be started."""

    model: str
    worker_type: str
    provider: str = "headrace"
    path: str | None = None
    path_exist: bool = True
    proxy: bool = False
    enabled: bool = True
    params: list[ParameterDescription]
    description: str


class WorkerSupportedModels(msgspec.Struct, frozen=True, kw_only=True):
    """The models of this worker."""

    host: str
    port: int
    models: list[SupportedModel]


class ApplyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a model."""

    model: ModelName
    apply_type: Literal["start", "stop", "restart", "update_params"]
    params: dict[str, Any] | None = None


class ApplyOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a change; `timecost` is seconds."""

    message: str
    success: bool
    timecost: float


class StartupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be started or stopped; with `delete_after` its row is removed."""

    model: ModelName
    params: dict[str, Any] | None = None
    delete_after: bool | None = None


_METADATA = msgspec.json.Decoder(ModelMetadataRequest)
_APPLY = msgspec.json.Decoder(ApplyRequest)
_STARTUP = msgspec.json.Decoder(StartupRequest)


class ModelRoutes:
    """The handlers of the routes for models."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def metadata(self, _service: Service, exchange: Exchange) -> None:
        """Describe a model."""
        wire = await exchange.read(_METADATA)
        (info,) = self._cluster.models(wire.model)
        await exchange.answer(_metadata(wire.model, info))

    async def descriptions(self, _service: Service, exchange: Exchange) -> None:
        """List the settings that a model can be started with."""
        query: bytes = exchange.scope.get("query_string", b"")
        names = parse_qs(query.decode("latin-1")).get("model", [])
        if len(names) != 1:
            raise InvalidRequest("Name one model: ?model=NAME.", param="model")
        self._cluster.models(names[0])
        await exchange.reply(msgspec.json.encode(_descriptions()))

    async def supports(self, _service: Service, exchange: Exchange) -> None:
        """List the models that can be started."""
        models = [
            SupportedModel(
                model=info.id,
                worker_type=kind,
                params=_descriptions(),
                description=_description(info),
            )
            for info in self._cluster.models()
            for task, kind in WORKER_TYPES.items()
            if task in info.capabilities.tasks
        ]
        host, port = self._cluster.address
        worker = WorkerSupportedModels(host=host, port=port, models=models)
        await exchange.reply(msgspec.json.encode([worker]))

    async def apply(self, _service: Service, exchange: Exchange) -> None:
        """Start, stop, restart or change a model; a failure is an output too."""
        self._cluster.check(exchange)
        wire = await exchange.read(_APPLY)
        began = time.monotonic()
        try:
            await self._change(wire)
        except HeadraceError as error:
            message, success = f"{wire.model}: {exchange.problem(error).message}", False
        else:
            message, success = f"{wire.model}: {wire.apply_type} was successful.", True
        took = round(time.monotonic() - began, 3)
        await exchange.answer(ApplyOutput(message=message, success=success, timecost=took))

    async def startup(self, _service: Service, exchange: Exchange) -> None:
        """Start a model; the answer is null."""
        self._cluster.check(exchange)
        wire = await exchange.read(_STARTUP)
        await _changed(exchange, self._cluster.start(wire.model, _changes(wire.params)))

    async def shutdown(self, _service: Service, exchange: Exchange) -> None:
        """Stop a model; the answer is null."""
        self._cluster.check(exchange)
        wire = await exchange.read(_STARTUP)
        delete = bool(wire.delete_after)
        await _changed(exchange, self._cluster.stop(wire.model, delete=delete))

    async def _change(self, wire: ApplyRequest) -> None:
        if wire.apply_type == "update_params":
            await self._cluster.update(wire.model, _changes(wire.params))
            return
        actions: dict[str, Callable[[], Awaitable[None]]] = {
            "start": lambda: self._cluster.start(wire.model, _changes(wire.params)),
            "stop": lambda: self._cluster.stop(wire.model),
            "restart": lambda: self._cluster.restart(wire.model),
        }
        await actions[wire.apply_type]()


async def _changed(exchange: Exchange, change: Awaitable[None]) -> None:
    try:
        await change
    except ConfigError as error:
        # The wrong setting is in the request.
        raise InvalidRequest(error.message, param=error.param) from None
    await exchange.reply(b"null")


def _changes(params: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings among the parameters; DB-GPT sends those of its own with them."""
    return {
        name: value
        for name, value in (params or {}).items()
        if name in _PARAMETERS and value is not None
    }


def _metadata(name: str, info: ModelInfo) -> ModelMetadata:
    context = info.context_length or _DEFAULT_CONTEXT
    return ModelMetadata(
        model=name,
        label=name,
        context_length=context,
        max_output_length=context,
        description=_description(info),
        chat_model=info.capabilities.chat or info.state != "ready",
        function_calling=info.capabilities.tools != "none",
    )


def _description(info: ModelInfo) -> str:
    facts = (info.architecture, info.quantization, info.engine and f"engine {info.engine}")
    return ", ".join(fact for fact in facts if fact)


def _descriptions() -> list[ParameterDescription]:
    return [
        ParameterDescription(
            param_name=name,
            param_type=kind,
            label=name.replace("_", " ").capitalize(),
            description=SETTINGS[name].help,
            param_order=order,
        )
        for order, (name, kind) in enumerate(_PARAMETERS.items())
    ]
