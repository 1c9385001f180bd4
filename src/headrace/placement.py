"""What a model's settings say of engines and devices, and the devices of a worker.

They are those that were chosen for it, or that its `device` names.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace import engines, machine
from headrace.core.device import check_device, read_device
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec, PlacedSpec
from headrace.engines.base import check_task
from headrace.models.providers import PROVIDERS
from headrace.models.reference import is_remote
from headrace.text.calls.families import FAMILIES


def check_devices(specs: Iterable[ModelSpec]) -> None:
    """Check that this machine has the devices of the models.

    Raises:
        ConfigError: it does not.
    """
    known: tuple[str, ...] = ()
    for spec in specs:
        setting = read_device(spec.device)
        if not is_remote(spec.model) and (setting.gpus or setting.kind == "cuda"):
            known = known or tuple(device.key for device in machine.devices())
            try:
                check_device(setting, known)
            except ConfigError as error:
                raise ConfigError(f"{spec.name}: {error.message}", param="device") from error


def check_spec(spec: ModelSpec) -> None:
    """Check what the settings of a model name.

    Raises:
        ConfigError: there is no such format of calls, or what is to run the model has not its task.
    """
    if spec.tool_format is not None and spec.tool_format not in FAMILIES:
        raise ConfigError(
            f"{spec.tool_format} is none of {', '.join(FAMILIES)}.", param="tool_format"
        )
    if spec.task is None:
        return
    engine = spec.engine
    if is_remote(spec.model):
        provider = PROVIDERS[spec.model.partition(":")[0]]
        engine = engine or provider.engine
        check_task(spec.task, provider.title, provider.tasks)
    if engine is not None:
        check_task(spec.task, f"Engine {engine}", engines.about(engine).tasks)


def placement(spec: ModelSpec, engine: str) -> tuple[str, ...]:
    """Return the devices that were chosen for a worker, or the GPUs that its `device` names.

    Raises:
        ConfigError: the machine does not have them, or the engine cannot use them.
    """
    setting, about = read_device(spec.device), engines.about(engine)
    placed = spec.placed if isinstance(spec, PlacedSpec) else ()
    if about.remote or setting.kind == "auto":
        return placed
    if setting.kind not in about.devices:
        raise ConfigError(
            f"{spec.name}: device: engine {engine} runs on {', '.join(about.devices)}, not on "
            f"{setting.kind}.",
            param="device",
        )
    check_devices([spec])
    gpus = setting.gpus or tuple(f"cuda:{number}" for number in range(setting.number or 0))
    if len(gpus) > 1 and not about.spreads:
        raise ConfigError(
            f"{spec.name}: device: engine {engine} runs on one GPU, not on {len(gpus)}.",
            param="device",
        )
    return placed or gpus
