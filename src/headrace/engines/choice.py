"""The choice of an engine for a model. Nothing here looks at the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from headrace.core.errors import ConfigError
from headrace.core.model import Task
from headrace.engines.base import About

_ORDER = {
    "cpu": ("llamacpp", "llama_server", "transformers", "openvino", "vllm"),
    "cuda": ("vllm", "llama_server", "llamacpp", "transformers", "openvino"),
    "vectors": (
        *("sentence_transformers", "llamacpp", "llama_server", "openvino"),
        *("transformers", "vllm"),
    ),
}
"""The order of engines. Few of them read the same format."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has to run. `device` is the likely device, `required_device` None for any.

    `options` are the names of the options that are set; an engine without one is not chosen. `able`
    are those of `core.model.ABILITIES` that it has to have.
    """

    format: str
    task: Task = "generate"
    device: str = "cpu"
    required_device: str | None = None
    options: frozenset[str] = frozenset()
    able: frozenset[str] = frozenset()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, the names of its options, and how to install it (None: it is installed)."""

    name: str
    about: About
    options: frozenset[str] = frozenset()
    missing: str | None = None


def choose(requirements: Requirements, candidates: Iterable[Candidate]) -> tuple[str, str]:
    """Return the engine's name, and the reason as a sentence.

    Raises:
        ConfigError: no installed engine can run it.
    """
    all_candidates = list(candidates)
    suitable = [candidate for candidate in all_candidates if _suits(candidate, requirements)]
    suitable.sort(key=lambda candidate: _rank(candidate, requirements))
    # An option that none of them knows is refused by name, by the engine that is chosen.
    suitable = [
        candidate for candidate in suitable if requirements.options <= candidate.options
    ] or suitable
    installed = [candidate.name for candidate in suitable if candidate.missing is None]
    if not installed:
        raise ConfigError(_no_engine(requirements, suitable or all_candidates))
    return installed[0], _reason(requirements, suitable[0], installed)


def _suits(candidate: Candidate, requirements: Requirements) -> bool:
    about = candidate.about
    return (
        about.automatic
        and requirements.format in about.formats
        and requirements.task in about.tasks
        and requirements.required_device in (None, *about.devices)
        and requirements.able <= about.able
    )


def _rank(candidate: Candidate, requirements: Requirements) -> tuple[bool, int, str]:
    name, device = candidate.name, requirements.device
    lacks = device not in candidate.about.devices
    kind = "vectors" if requirements.task != "generate" else "cpu" if lacks else device
    order = _ORDER.get(kind, _ORDER["cpu"])
    return lacks, (order.index(name) if name in order else len(order)), name


def _reason(requirements: Requirements, first: Candidate, installed: Sequence[str]) -> str:
    reason = f"{_subject(requirements)}: {installed[0]}"
    if len(installed) > 1:
        reason += f", before {', '.join(installed[1:])} (`headrace tune` compares them)"
    if first.missing is not None:
        reason += f"; {first.name} would come first, {first.missing}"
    return reason


def _subject(requirements: Requirements) -> str:
    work = (
        requirements.format
        if requirements.task == "generate"
        else f"{requirements.format} to {requirements.task}"
    )
    return work if requirements.format in ("none", "remote") else f"{work} on {requirements.device}"


def _no_engine(requirements: Requirements, candidates: Sequence[Candidate]) -> str:
    task = "run" if requirements.task == "generate" else requirements.task
    where = f" on {requirements.required_device}" if requirements.required_device else ""
    where += f" with {', '.join(sorted(requirements.able))}" if requirements.able else ""
    known = "; ".join(
        f"{candidate.name} reads {'/'.join(candidate.about.formats)}, "
        f"{candidate.missing or 'installed'}"
        for candidate in candidates
    )
    return f"No engine here can {task} a model in the format {requirements.format}{where}. {known}."
