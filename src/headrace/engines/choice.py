"""The choice of an engine for a model. Nothing here looks at the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from headrace.core.errors import ConfigError
from headrace.core.model import Task
from headrace.engines.base import About

_ORDER = {
    "cpu": ("llamacpp", "transformers", "openvino", "vllm"),
    "cuda": ("vllm", "llamacpp", "transformers", "openvino"),
    "vectors": ("sentence_transformers", "llamacpp", "openvino", "transformers", "vllm"),
}
"""The order of engines where nothing was measured. Few of them read the same format."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has to run. `device` is the likely device, `required_device` None for any.

    `options` are the names of the options that are set; an engine without one is not chosen.
    """

    format: str
    task: Task = "generate"
    device: str = "cpu"
    required_device: str | None = None
    options: frozenset[str] = frozenset()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, the names of its options, and how to install it (None: it is installed)."""

    name: str
    about: About
    options: frozenset[str] = frozenset()
    missing: str | None = None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Results of `headrace tune` for an engine with this model, on this machine.

    `rates` are output tokens/s with the engine's defaults, `best` with its best options; both by
    the number of streams. `fault` is how its answers differ from the reference's.
    """

    engine: str
    day: str
    rates: dict[int, float]
    best: dict[int, float]
    fault: str | None = None


def choose(
    requirements: Requirements, candidates: Iterable[Candidate], measured: Sequence[Measured] = ()
) -> tuple[str, str]:
    """Return the engine's name, and the reason as a sentence.

    Of measured engines, the fastest for one stream is chosen. An engine whose answers differ from
    the reference's is never chosen.

    Raises:
        ConfigError: no installed engine can run it.
    """
    all_candidates = list(candidates)
    suitable = [candidate for candidate in all_candidates if _suits(candidate, requirements)]
    suitable.sort(key=lambda candidate: _rank(candidate.name, requirements))
    # An option that none of them knows is refused by name, by the engine that is chosen.
    suitable = [
        candidate for candidate in suitable if requirements.options <= candidate.options
    ] or suitable
    installed = [candidate.name for candidate in suitable if candidate.missing is None]
    faults = {result.engine: result.fault for result in measured if result.fault}
    usable = [name for name in installed if name not in faults]
    if not usable:
        raise ConfigError(_no_engine(requirements, suitable or all_candidates, faults))
    results = (result for result in measured if result.engine in usable and result.rates)
    known = {result.engine: result for result in results}
    if usable[0] in known:
        name = max(known, key=lambda engine: _single_stream(known[engine]))
        return name, _measured_reason(requirements, name, known, faults)
    return usable[0], _default_reason(requirements, suitable, usable, faults)


def _suits(candidate: Candidate, requirements: Requirements) -> bool:
    about = candidate.about
    return (
        about.automatic
        and requirements.format in about.formats
        and requirements.task in about.tasks
        and requirements.required_device in (None, *about.devices)
    )


def _rank(name: str, requirements: Requirements) -> tuple[int, str]:
    order = _ORDER["vectors" if requirements.task != "generate" else requirements.device]
    return (order.index(name) if name in order else len(order)), name


def _single_stream(result: Measured) -> float:
    return result.rates[min(result.rates)]


def _measured_reason(
    requirements: Requirements, name: str, known: Mapping[str, Measured], faults: Mapping[str, str]
) -> str:
    rates = ", ".join(
        f"{engine} {_single_stream(known[engine]):.0f}"
        for engine in sorted(known, key=lambda engine: engine != name)
    )
    measured = f"measured here on {known[name].day}, tokens/s alone: {rates}"
    reasons = [f"{_subject(requirements)}: {name}; {measured}"]
    streams = max(max(result.best, default=0) for result in known.values())
    rates_then = {
        name: result.best[streams] for name, result in known.items() if result.best.get(streams)
    }
    fastest = max(rates_then, key=lambda engine: rates_then[engine], default=name)
    if fastest != name and rates_then.get(name):
        ratio = rates_then[fastest] / rates_then[name]
        reasons.append(f"for {streams} streams at once {fastest} has {ratio:.1f} times as many")
    return "; ".join([*reasons, *_exclusions(faults)])


def _default_reason(
    requirements: Requirements,
    suitable: Sequence[Candidate],
    usable: Sequence[str],
    faults: Mapping[str, str],
) -> str:
    reasons = [f"{_subject(requirements)}: {usable[0]}"]
    if len(usable) > 1:
        reasons[0] += f", before {', '.join(usable[1:])}"
        reasons.append("nothing was measured here (`headrace tune`)")
    if suitable[0].missing is not None:
        reasons.append(f"{suitable[0].name} would come first, {suitable[0].missing}")
    return "; ".join([*reasons, *_exclusions(faults)])


def _exclusions(faults: Mapping[str, str]) -> list[str]:
    return [f"not {engine}: {fault}" for engine, fault in faults.items()]


def _subject(requirements: Requirements) -> str:
    work = (
        requirements.format
        if requirements.task == "generate"
        else f"{requirements.format} to {requirements.task}"
    )
    return work if requirements.format in ("none", "remote") else f"{work} on {requirements.device}"


def _no_engine(
    requirements: Requirements, candidates: Sequence[Candidate], faults: Mapping[str, str]
) -> str:
    task = "run" if requirements.task == "generate" else requirements.task
    where = f" on {requirements.required_device}" if requirements.required_device else ""
    known = "; ".join(
        f"{candidate.name} reads {'/'.join(candidate.about.formats)}, "
        f"{faults.get(candidate.name) or candidate.missing or 'installed'}"
        for candidate in candidates
    )
    return f"No engine here can {task} a model in the format {requirements.format}{where}. {known}."
