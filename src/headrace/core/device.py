"""The setting `device` of a model: a kind, GPUs by name, or a number of GPUs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

from headrace.core.errors import ConfigError

_KIND, _GPU = re.compile("[a-z][a-z0-9_]*"), re.compile(r"(?:cuda:)?(\d{1,3})")
_MAX_GPUS = 64
_MAX_CHOICES = 64


class DeviceSetting(NamedTuple):
    """`gpus` are named ones, `number` is how many of any; without both, the engine decides.

    `kind` is `auto` or one that an engine has: `cpu`, `cuda`, `mps`, `rocm` ...
    """

    kind: str = "auto"
    gpus: tuple[str, ...] = ()
    number: int | None = None


def device_text(value: object) -> object:
    """Return the setting as text that `read_device` reads: `cuda:0,cuda:1` for a list.

    Raises:
        ValueError: it is no device.
    """
    if isinstance(value, list | tuple):
        value = ",".join(str(item) for item in cast("Iterable[object]", value))
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    text = str(value).replace(" ", "").lower()
    read_device(text)
    return text


def read_device(text: str | None) -> DeviceSetting:
    """Read the setting.

    Raises:
        ValueError: it is no device.
    """
    if text is None:
        return DeviceSetting()
    if text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_GPUS:
        return DeviceSetting("cuda", number=int(text))
    if _KIND.fullmatch(text):
        return DeviceSetting(text)
    matches = [_GPU.fullmatch(word) for word in text.split(",")]
    numbers = [int(match[1]) for match in matches if match]
    # Without `cuda:` a single number is a count.
    is_named = len(numbers) > 1 or text.startswith("cuda:")
    if not is_named or len(set(numbers)) < len(matches):
        raise ValueError(
            f"{text!r} is no device; it is auto, cpu, cuda, mps, rocm, sycl, vulkan, cuda:1, a "
            f"list of GPUs like cuda:0,cuda:1, or their number"
        )
    return DeviceSetting("cuda", tuple(f"cuda:{number}" for number in numbers))


def check_device(setting: DeviceSetting, known: Sequence[str]) -> None:
    """Check that this machine has the devices; `known` are their names.

    Raises:
        ConfigError: it does not.
    """
    gpus = [name for name in known if name.startswith("cuda:")]
    missing = [name for name in setting.gpus if name not in gpus]
    if not missing and len(gpus) < (setting.number or (setting.kind == "cuda")):
        missing = [f"{setting.number} GPUs" if setting.number else "cuda"]
    if missing:
        raise ConfigError(
            f"device: there is no {', '.join(missing)} on this machine; it has {', '.join(known)}.",
            param="device",
        )


def placements(setting: DeviceSetting, known: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Return the sets of GPUs on which a model can run that takes `count` of them.

    Raises:
        ConfigError: the machine has fewer.
    """
    if setting.gpus:
        return [setting.gpus]
    gpus = [name for name in known if name.startswith("cuda:")]
    count = setting.number or count
    check_device(DeviceSetting("cuda", number=count), known)
    return [*itertools.islice(itertools.combinations(gpus, count), _MAX_CHOICES)]
