"""`headrace doctor`: what is here, what could run, and why something could not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli import terminal
from headrace.cli.common import Common


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
    }
    if common.as_json:
        terminal.print_json(found)
        return
    plain = msgspec.to_builtins(found, enc_hook=str)
    machine = plain["system"]
    terminal.columns((), [("os", machine["os"]), ("python", machine["python"]), _cpu(machine)])
    terminal.columns((), [("library", *pair) for pair in machine["libraries"].items()])
    print()
    terminal.columns(("ENGINE", "RUNS", "FORMATS", "WHY"), [_engine(e) for e in plain["engines"]])
    print()
    with_key = [one["name"] for one in plain["providers"] if one["key_is_set"]]
    names = ", ".join(one["name"] for one in plain["providers"])
    print(f"remote  {names}; keys are set for: {', '.join(with_key) or 'none'}")
    print()
    terminal.columns(("DEVICE", "MEMORY", "FREE"), [_device(one) for one in machine["devices"]])
    print()
    free, count = terminal.size(plain["home"]["free"]), plain["home"]["models"]
    print(f"home    {home} ({count} models, {free} free)")
    print(f"config  {settings.file or 'none; ' + ' and '.join(map(str, settings.searched))}")


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


def _device(device: dict[str, Any]) -> tuple[str | None, ...]:
    free = device["total"] - device["used"]
    return device["name"], terminal.size(device["total"]), terminal.size(free)
