"""SystemInfo: the facts of the machine, also as attributes of spans."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from headrace import __version__
from headrace.machine.hardware import Device, driver, gpus, host
from headrace.machine.process import resident

_CPUINFO = Path("/proc/cpuinfo")
_LIBRARIES = (
    *("xllamacpp", "openvino", "openvino-genai", "transformers", "torch", "accelerate"),
    *("sentence-transformers", "vllm", "openai", "anthropic", "numpy", "gguf", "safetensors"),
    *("pydantic", "msgspec", "fastapi", "starlette", "httptools", "opentelemetry-sdk"),
)
_INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "asimd")
_TYPES = {"win32": "windows"}


class SystemInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of the machine, for the log of a worker's start and for `doctor`.

    `driver` and `cuda` are versions of the GPU driver and of the CUDA that it supports; empty
    without one. `libraries` are the installed ones of engines and the service.
    """

    os: str
    os_type: str
    arch: str
    python: str
    implementation: str
    cpu: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    libraries: dict[str, str]
    driver: str
    cuda: str
    devices: tuple[Device, ...]


def system() -> SystemInfo:
    """Read the facts of this machine. Takes some milliseconds."""
    name, flags = _cpu()
    version, cuda = driver()
    process = psutil.Process()
    return SystemInfo(
        os=platform.platform(),
        os_type=_TYPES.get(sys.platform, sys.platform),
        arch=platform.machine(),
        python=platform.python_version(),
        implementation=sys.implementation.name,
        cpu=name,
        cores=psutil.cpu_count(logical=False) or 1,
        threads=psutil.cpu_count() or 1,
        instruction_sets=tuple(flag for flag in _INSTRUCTION_SETS if flag in flags),
        libraries={"headrace": __version__, **dict(_versions())},
        driver=version,
        cuda=cuda,
        devices=(host(resident([process])), *gpus({process.pid}, metered=True)),
    )


Attribute = str | int | float | bool | tuple[str, ...]


def attributes(info: SystemInfo) -> dict[str, Attribute]:
    """Return the facts as attributes, with OpenTelemetry's names if it has any.

    Memory is in bytes. GPUs are numbered as by the driver.
    """
    first, *others = info.devices
    values: dict[str, Attribute] = {
        "os.type": info.os_type,
        "os.description": info.os,
        "host.arch": info.arch,
        "host.cpu.model.name": info.cpu,
        "process.runtime.name": info.implementation,
        "process.runtime.version": info.python,
        "headrace.cpu.cores": info.cores,
        "headrace.cpu.threads": info.threads,
        "headrace.cpu.instruction_sets": info.instruction_sets,
        "headrace.memory": first.total,
    }
    values |= {f"headrace.library.{name}": version for name, version in info.libraries.items()}
    if others:
        values |= {"headrace.gpu.driver": info.driver, "headrace.gpu.cuda": info.cuda}
    for number, gpu in enumerate(others):
        values[f"headrace.gpu.{number}.name"] = gpu.name.partition(" ")[2]
        values[f"headrace.gpu.{number}.memory"] = gpu.total
        values[f"headrace.gpu.{number}.energy"] = gpu.energy
    return values


def _cpu() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    with contextlib.suppress(OSError), _CPUINFO.open(encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                return name, frozenset(value.split())
    return name, flags


def _versions() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield library, metadata.version(library)
