"""Which engine suits a model, of those that could run it. Nothing here asks the machine."""

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
"""Which engine comes first where nothing was measured. The format leaves few of them."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run. `device` is where it would run, `asked` where it must (None: anywhere).

    `options` are the names of those that are set; an engine that lacks one is not chosen.
    """

    format: str
    task: Task = "generate"
    device: str = "cpu"
    asked: str | None = None
    options: frozenset[str] = frozenset()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, the names of its options, and how to install it (None: it is)."""

    name: str
    about: About
    options: frozenset[str] = frozenset()
    missing: str | None = None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What `headrace tune` has found of one engine and this model, on this machine.

    `rates` are output tokens/s with the engine's defaults, `best` with its best options; both by
    the number of streams. `fault` tells how its answers differ from the reference's.
    """

    engine: str
    day: str
    rates: dict[int, float]
    best: dict[int, float]
    fault: str | None = None


def choose(
    wish: Wish, candidates: Iterable[Candidate], measured: Sequence[Measured] = ()
) -> tuple[str, str]:
    """Return the engine, and why it, in a sentence.

    Of what was measured, the fastest for one stream is taken, and never an engine whose answers
    were found to differ.

    Raises:
        ConfigError: no installed engine can run it.
    """
    every = list(candidates)
    able = [candidate for candidate in every if _suits(candidate, wish)]
    able.sort(key=lambda candidate: _rank(candidate.name, wish))
    # An option that none of them knows is refused by name, by the engine that is chosen.
    able = [candidate for candidate in able if wish.options <= candidate.options] or able
    installed = [candidate.name for candidate in able if candidate.missing is None]
    faults = {result.engine: result.fault for result in measured if result.fault}
    right = [name for name in installed if name not in faults]
    if not right:
        raise ConfigError(_nothing(wish, able or every, faults))
    useful = (result for result in measured if result.engine in right and result.rates)
    known = {result.engine: result for result in useful}
    if right[0] in known:
        name = max(known, key=lambda engine: _alone(known[engine]))
        return name, _as_measured(wish, name, known, faults)
    return right[0], _as_ordered(wish, able, right, faults)


def _suits(candidate: Candidate, wish: Wish) -> bool:
    about = candidate.about
    return (
        about.automatic
        and wish.format in about.formats
        and wish.task in about.tasks
        and wish.asked in (None, *about.devices)
    )


def _rank(name: str, wish: Wish) -> tuple[int, str]:
    order = _ORDER["vectors" if wish.task != "generate" else wish.device]
    return (order.index(name) if name in order else len(order)), name


def _alone(result: Measured) -> float:
    return result.rates[min(result.rates)]


def _as_measured(
    wish: Wish, name: str, known: Mapping[str, Measured], faults: Mapping[str, str]
) -> str:
    rates = ", ".join(
        f"{engine} {_alone(known[engine]):.0f}"
        for engine in sorted(known, key=lambda engine: engine != name)
    )
    reasons = [
        f"{_subject(wish)}: {name}; measured here on {known[name].day}, tokens/s alone: {rates}"
    ]
    most = max(max(result.best, default=0) for result in known.values())
    at_most = {name: result.best[most] for name, result in known.items() if result.best.get(most)}
    top = max(at_most, key=lambda engine: at_most[engine], default=name)
    if top != name and at_most.get(name):
        ratio = at_most[top] / at_most[name]
        reasons.append(f"for {most} streams at once {top} has {ratio:.1f} times as many")
    return "; ".join([*reasons, *_refused(faults)])


def _as_ordered(
    wish: Wish, able: Sequence[Candidate], right: Sequence[str], faults: Mapping[str, str]
) -> str:
    reasons = [f"{_subject(wish)}: {right[0]}"]
    if len(right) > 1:
        reasons[0] += f", before {', '.join(right[1:])}"
        reasons.append("nothing was measured here (`headrace tune`)")
    if able[0].missing is not None:
        reasons.append(f"{able[0].name} would come first, {able[0].missing}")
    return "; ".join([*reasons, *_refused(faults)])


def _refused(faults: Mapping[str, str]) -> list[str]:
    return [f"not {engine}: {fault}" for engine, fault in faults.items()]


def _subject(wish: Wish) -> str:
    work = wish.format if wish.task == "generate" else f"{wish.format} to {wish.task}"
    return work if wish.format in ("none", "remote") else f"{work} on {wish.device}"


def _nothing(wish: Wish, seen: Sequence[Candidate], faults: Mapping[str, str]) -> str:
    task = "run" if wish.task == "generate" else wish.task
    where = f" on {wish.asked}" if wish.asked else ""
    known = "; ".join(
        f"{candidate.name} reads {'/'.join(candidate.about.formats)}, "
        f"{faults.get(candidate.name) or candidate.missing or 'installed'}"
        for candidate in seen
    )
    return f"No engine here can {task} a model in the format {wish.format}{where}. {known}."
