"""`headrace doctor`: what is here, what could run, and why something could not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.cli import terminal
from headrace.cli.common import Common

if TYPE_CHECKING:
    from headrace.config import Config
    from headrace.machine import Device


def doctor(common: Common) -> None:
    """Tell versions, engines, devices, memory, and where models and settings are."""
    from headrace import runtime

    settings = common.settings()
    system = runtime.system()
    home = settings.config.home
    found: dict[str, Any] = {
        "system": system,
        "engines": runtime.engines(),
        "providers": [_known(*one) for one in runtime.providers().items()],
        "home": {"path": home, "free": _free(home), "models": len(_stored(settings.config))},
        "configuration": {"file": settings.file, "searched": list(settings.searched)},
        "telemetry": _telemetry(settings.config),
    }
    if common.as_json:
        terminal.print_json(found)
        return
    plain = msgspec.to_builtins(found, enc_hook=str)
    machine = plain["system"]
    terminal.columns((), [("os", machine["os"]), ("python", machine["python"]), _cpu(machine)])
    terminal.columns((), [("library", *pair) for pair in machine["libraries"].items()])
    if machine["driver"]:
        print(f"gpu driver {machine['driver']}, for CUDA {machine['cuda'] or 'unknown'}")
    print()
    terminal.columns(("ENGINE", "RUNS", "FORMATS", "WHY"), [_engine(e) for e in plain["engines"]])
    print()
    with_key = [one["name"] for one in plain["providers"] if one["key_is_set"]]
    names = ", ".join(one["name"] for one in plain["providers"])
    print(f"remote  {names}; keys are set for: {', '.join(with_key) or 'none'}")
    print()
    heads = ("DEVICE", "MEMORY", "FREE", "ENERGY")
    terminal.columns(heads, [_device(one) for one in system.devices])
    print()
    free, count = terminal.size(plain["home"]["free"]), plain["home"]["models"]
    print(f"home    {home} ({count} models, {free} free)")
    print(f"config  {settings.file or 'none; ' + ' and '.join(map(str, settings.searched))}")
    _print_telemetry(plain["telemetry"], has_sdk="opentelemetry-sdk" in machine["libraries"])


def _known(name: str, provider: Any) -> dict[str, Any]:
    is_set = bool(os.environ.get(provider.key)) if provider.key else False
    facts = {"title": provider.title, "base_url": provider.base_url, "key": provider.key}
    return {"name": name, **facts, "key_is_set": is_set}


def _stored(config: Any) -> list[Any]:
    from headrace import runtime

    return list(runtime.store(config).list())


def _free(path: Path) -> int:
    """Return the bytes free where the folder is, or will be."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


def _cpu(machine: dict[str, Any]) -> tuple[str, str]:
    sets = ", ".join(machine["instruction_sets"])
    return "cpu", f"{machine['cpu']}, {machine['cores']} cores; {sets}"


def _engine(engine: dict[str, Any]) -> tuple[str, ...]:
    runs = "yes" if engine["available"] else "no"
    return engine["name"], runs, ", ".join(engine["formats"]), engine["reason"]


def _device(device: Device) -> tuple[str | None, ...]:
    told = None if device.kind == "cpu" else device.energy
    free = device.total - device.used
    return device.name, terminal.size(device.total), terminal.size(free), told


def _telemetry(config: Config) -> dict[str, Any]:
    """Return what is kept of requests and where, and who is told of them."""
    from headrace.telemetry import otel, trace_file, usage

    kept, port = config.telemetry, config.server.port
    if kept.metrics_port is not None:
        port = kept.metrics_port
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    return {
        "traces": {"on": kept.traces, **_size(config.home / trace_file.FOLDER)},
        "content": kept.trace_content,
        "usage": {"on": kept.usage, **_size(config.home / usage.FILE)},
        "spans": otel.switched_on_by(os.environ),
        "metrics": f"http://{host}:{port or 'PORT'}/metrics" if kept.metrics else None,
    }


def _size(place: Path) -> dict[str, Any]:
    files = [one for one in (place, *place.glob("*")) if one.is_file()]
    return {"path": place, "size": sum(one.stat().st_size for one in files)}


def _print_telemetry(told: dict[str, Any], *, has_sdk: bool) -> None:
    for name in ("traces", "usage"):
        one = told[name]
        print(f"{name:7} {one['path']} ({terminal.size(one['size']) if one['on'] else 'off'})")
    print(f"metrics {told['metrics'] or 'off'}")
    needs = "" if has_sdk else ", but not installed: pip install 'headrace[otlp]'"
    print(f"spans   {'on, by ' + told['spans'] + needs if told['spans'] else 'off'}")
