"""GPUs of any vendor, as the kernel lists them, without a driver's library."""

from __future__ import annotations

import contextlib
import sys
from functools import cache
from pathlib import Path

_NAMES = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_CARDS = Path("/sys/class/drm")
_NVIDIA = Path("/proc/driver/nvidia/version")


@cache
def vendors() -> tuple[str, ...]:
    """Return the vendors of the GPUs of this machine, each once: nvidia, amd, intel, apple."""
    if sys.platform == "darwin":
        return ("apple",)
    names = ["nvidia"] if _NVIDIA.exists() else []
    for file in sorted(_CARDS.glob("card*/device/vendor")):
        with contextlib.suppress(OSError):
            names.append(_NAMES.get(file.read_text(encoding="ascii").strip(), ""))
    return tuple(name for name in dict.fromkeys(names) if name)
