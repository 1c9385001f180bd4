"""What a model's settings say of engines and devices, and the devices of a worker.

They are those that were chosen for it, or that its `device` names.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace import engines, machine
from headrace.core.device import check_device, read_device
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec, PlacedSpec
from headrace.models.reference import is_remote


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
