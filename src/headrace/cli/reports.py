"""`headrace doctor`, `config` and `usage`: the machine, the settings, the tokens used."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer
from typer import Argument, Option

from headrace.cli import terminal
from headrace.cli.common import Common, with_common
from headrace.core.errors import ConfigError
from headrace.core.install import install_command

if TYPE_CHECKING:
    from headrace.config import Config
    from headrace.machine import Device
    from headrace.telemetry.usage import Amounts

_USED = {
    "REQUESTS": "requests",
    "FAILED": "failed",
    "REFUSED": "refused",
    "CANCELLED": "cancelled",
    "PROMPT": "prompt_tokens",
    "CACHED": "cached_tokens",
    "COMPLETION": "completion_tokens",
    "REASONING": "reasoning_tokens",
    "SECONDS": "seconds",
    "JOULES": "joules",
}

config = typer.Typer(help="Show the configuration.", no_args_is_help=True)


def show(
    common: Common,
    models: Annotated[
        list[str] | None, Argument(metavar="MODEL", help="Further models to show.")
    ] = None,
) -> None:
    """Print each value with its origin; secrets are masked."""
    rows = list(common.settings(service=True).show(models or []))
    values = {row.key: {"value": row.value, "origin": row.origin} for row in rows}
    heads = ("KEY", "VALUE", "ORIGIN")
    common.show(values, terminal.aligned(heads, (_setting(*row) for row in rows)))


def _setting(key: str, value: Any, origin: str) -> tuple[str, str | None, str]:
    shown = ", ".join(cast("list[str]", value)) if isinstance(value, list) else value
    # One line, even for a chat template.
    return key, None if shown in (None, "") else str(shown).replace("\n", "\\n")[:60], origin


def path(common: Common) -> None:
    """Print the configuration file, and the paths that are searched."""
    settings = common.settings(service=True)
    places = {"file": settings.file, "searched": list(settings.searched)}
    common.show(places, [str(settings.file or "No file is read.")])
    for place in () if common.as_json else settings.searched:
        terminal.note(f"looked at {place}")


config.command("show")(with_common(show))
config.command("path")(with_common(path))


def doctor(common: Common) -> None:
    """Show versions, engines, devices, memory, and where models and settings are."""
    from headrace import runtime
    from headrace.machine.hardware import usable_cpus

    settings = common.settings()
    system, home = runtime.system(), settings.config.home
    stored = list(runtime.store(settings.config).list())
    report: dict[str, Any] = {
        "system": system,
        "usable_cpus": usable_cpus(),
        "engines": runtime.engines(),
        "programs": runtime.programs(),
        "providers": [_provider(*item) for item in runtime.providers().items()],
        "home": {"path": home, "free": _free(home), "models": len(stored)},
        "configuration": {"file": settings.file, "searched": list(settings.searched)},
        "telemetry": _telemetry(settings.config),
        "dbgpt": _cluster(settings.config),
        "confine": {"setting": settings.config.server.confine, **runtime.confinement()},
    }
    common.show(report, _doctor_lines(msgspec.to_builtins(report, enc_hook=str), system.devices))


def _doctor_lines(report: dict[str, Any], devices: Sequence[Device]) -> Iterator[str]:
    machine, home, files = report["system"], report["home"], report["configuration"]
    cores = f"{machine['cores']} cores (usable CPUs: {report['usable_cpus']})"
    cpu = f"{machine['cpu']}, {cores}; {', '.join(machine['instruction_sets'])}"
    about = [("os", machine["os"]), ("python", machine["python"]), ("cpu", cpu)]
    if machine["driver"]:
        about.append(("gpu", f"driver {machine['driver']}, CUDA {machine['cuda'] or 'unknown'}"))
    libraries = (f"{name} {version}" for name, version in machine["libraries"].items())
    yield from terminal.aligned((), [*about, ("libraries", ", ".join(libraries))])
    yield ""
    yield from terminal.aligned(
        ("ENGINE", "RUNS", "FORMATS", "WHY"), map(_engine, report["engines"])
    )
    programs = [(name, line) for name, lines in report["programs"].items() for line in lines]
    yield from ("", *terminal.aligned((), programs)) if programs else ()
    names = ", ".join(provider["name"] for provider in report["providers"])
    with_key = ", ".join(item["name"] for item in report["providers"] if item["key_is_set"])
    yield ""
    yield from terminal.aligned(("DEVICE", "MEMORY", "FREE", "ENERGY"), map(_device, devices))
    yield ""
    telemetry, has_sdk = report["telemetry"], "opentelemetry-sdk" in machine["libraries"]
    places = [
        ("remote", f"{names}; keys are set for: {with_key or 'none'}"),
        ("home", f"{home['path']} ({home['models']} models, {terminal.size(home['free'])} free)"),
        ("config", files["file"] or f"none; looked for {' and '.join(files['searched'])}"),
        ("dbgpt", _cluster_facts(report["dbgpt"])),
        ("confine", _confinement(report["confine"])),
        *_telemetry_facts(telemetry, has_sdk=has_sdk),
    ]
    yield from terminal.aligned((), places)


def _cluster(config: Config) -> dict[str, Any]:
    """Return the DB-GPT controllers, and whether each can be reached from here."""
    dbgpt = config.dbgpt
    place = dbgpt.advertise or f"{dbgpt.host}:{dbgpt.port}"
    answering = {url: _answers(url) for url in dbgpt.controller}
    return {"controllers": answering, "worker": place, "without_key": dbgpt.without_key}


def _answers(url: str) -> bool:
    import httpx2

    try:
        return httpx2.get(f"{url}/api/health", timeout=2, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def _cluster_facts(cluster: dict[str, Any]) -> str:
    states = [
        f"{url} ({'answers' if answers else 'cannot be reached'})"
        for url, answers in cluster["controllers"].items()
    ]
    if not states:
        return "no worker of a cluster"
    return f"worker on {cluster['worker']} of {', '.join(states)}"


def _confinement(held: dict[str, str]) -> str:
    setting, *rest = held.items()
    facts = ", ".join(f"{name}: {state}" for name, state in rest)
    return setting[1] + (f"; {facts}" if setting[1] == "auto" else "")


def _provider(name: str, provider: Any) -> dict[str, Any]:
    is_set = bool(os.environ.get(provider.key)) if provider.key else False
    facts = {"title": provider.title, "base_url": provider.base_url, "key": provider.key}
    return {"name": name, **facts, "key_is_set": is_set}


def _free(path: Path) -> int:
    """Return the free bytes of the disk that holds the folder, or will hold it."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


def _engine(engine: dict[str, Any]) -> tuple[str, ...]:
    runs = "yes" if engine["available"] else "no"
    return engine["name"], runs, ", ".join(engine["formats"]), engine["reason"]


def _device(device: Device) -> tuple[str | None, ...]:
    energy = None if device.kind == "cpu" else device.energy
    free = device.total - device.used
    return device.name, terminal.size(device.total), terminal.size(free), energy


def _telemetry(config: Config) -> dict[str, Any]:
    """Return which telemetry is on, and where it is kept."""
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
    files = [file for file in (place, *place.glob("*")) if file.is_file()]
    return {"path": place, "size": sum(file.stat().st_size for file in files)}


def _telemetry_facts(telemetry: dict[str, Any], *, has_sdk: bool) -> Iterator[tuple[str, str]]:
    for name in ("traces", "usage"):
        kept = telemetry[name]
        yield name, f"{kept['path']} ({terminal.size(kept['size']) if kept['on'] else 'off'})"
    yield "metrics", telemetry["metrics"] or "off"
    needs = "" if has_sdk else f", but not installed: {install_command('otlp')}"
    yield "spans", f"on, by {telemetry['spans']}{needs}" if telemetry["spans"] else "off"


def usage(
    common: Common,
    by: Annotated[
        str, Option(metavar="WHAT,...", help="Any of day, model, key, operation, priority.")
    ] = "day,model",
    since: Annotated[
        str, Option(metavar="DAY", help="From 2026-01-31 on, or 7d: a week with today.")
    ] = "",
    until: Annotated[str, Option(metavar="DAY", help="The last day of all.")] = "",
    model: Annotated[str | None, Option(help="Of this model only.")] = None,
    key: Annotated[str | None, Option(help="Of the key with this id; - is none.")] = None,
) -> None:
    """Show tokens, requests, seconds of engines and joules; days are those of UTC.

    It needs no running service; the counts of its last seconds may be missing.
    """
    from headrace.core.record import UsageFilter
    from headrace.telemetry import usage as counted
    from headrace.telemetry.usage_shared import read_usage

    groups = _groups(by, counted.GROUPS)
    first, last = _day(since, "--since"), _day(until, "--until")
    config = common.settings(service=True).config
    wanted = UsageFilter(since=first, until=last, model=model, key=key)
    entries = read_usage(config.server.database or "", config.home, groups, wanted)
    total = _named(counted.total(entries))
    report = {
        "since": first or None,
        "until": last or None,
        "by": groups,
        "rows": [entry.group | _named(entry.amounts) for entry in entries],
        "total": total,
    }
    heads = (*(name.upper() for name in groups), *_USED)
    rows = [(*entry.group.values(), *_named(entry.amounts).values()) for entry in entries]
    rows.append(("total", *[""] * (len(groups) - 1), *total.values()))
    common.show(report, terminal.aligned(heads, map(_rounded, rows), tuple(_USED)))


def _groups(by: str, known: Collection[str]) -> list[str]:
    wanted = list(dict.fromkeys(word.strip().lower() for word in by.split(",") if word.strip()))
    if not wanted or set(wanted) - set(known):
        raise ConfigError(f"flag --by: {by!r} is not some of {', '.join(known)}.")
    return wanted


def _day(text: str, flag: str) -> str:
    """Return YYYY-MM-DD; `7d` is six days before today, so that today is the seventh."""
    if not text:
        return ""
    try:
        if days := re.fullmatch(r"([1-9]\d{0,5})d", text):
            return str(datetime.now(UTC).date() - timedelta(int(days[1]) - 1))
        return str(date.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ConfigError(f"flag {flag}: {text!r} is no day like 2026-01-31, or 7d.") from None


def _named(amounts: Amounts) -> dict[str, Any]:
    joules = None if amounts.joules is None else round(amounts.joules, 1)
    figures = {name: getattr(amounts, name) for name in _USED.values()}
    return figures | {"seconds": round(amounts.seconds, 3), "joules": joules}


def _rounded(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(f"{cell:.1f}" if isinstance(cell, float) else cell for cell in row)
