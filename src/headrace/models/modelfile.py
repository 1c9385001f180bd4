"""Ollama's Modelfile: what it has, and the settings of a model that mean the same here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headrace.core.errors import ConfigError, InvalidRequest, LoadFailed, UnknownModel
from headrace.core.sampling import Sampling
from headrace.models import projector
from headrace.models.caches import ollama_weights
from headrace.models.reference import LocalReference, parse

MAX_MODELFILE = 1 << 20
_FENCE = '"""'
_ONE_FROM = "A Modelfile has one FROM, and perhaps one of a projector."
_GO = "it is a Go template; the model's own chat template is used"
_OWN = "how a model writes calls and thinking is found in its chat template"
_LEFT = {
    "TEMPLATE": _GO,
    "RENDERER": _GO.partition(";")[2].strip(),
    "PARSER": _OWN,
    "DRAFT": "the options speculation and draft_model are in its place",
    "REQUIRES": "it names a version of Ollama",
    "LICENSE": "a configuration has no place for it",
    "MESSAGE": "messages are sent with each request",
}
_COMMANDS = frozenset(("FROM", "PARAMETER", "SYSTEM", "ADAPTER", *_LEFT))

Number = Callable[[str], int | float]
_SAMPLING: Mapping[str, tuple[str, Number]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "seed": ("seed", int),
    "repeat_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "num_predict": ("max_tokens", int),
}
_OPTIONS = {"num_gpu": "gpu_layers", "num_thread": "threads", "num_batch": "batch_size"}
"""Parameters that are options of llama.cpp."""


class Instruction(msgspec.Struct, frozen=True):
    """One instruction; `line` is that of its beginning, from 1."""

    name: str
    value: str
    line: int


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[models.NAME]`, and what of the Modelfile is in none, with the reason."""

    name: str
    settings: dict[str, Any]
    left_out: dict[str, str]


def read(text: str) -> list[Instruction]:
    """Return the instructions of a Modelfile.

    Raises:
        ConfigError: a line is none, a text has no end, or there is no FROM.
    """
    instructions = [*_instructions(text.removeprefix("\ufeff"))]
    if not any(item.name == "FROM" for item in instructions):
        raise ConfigError(_ONE_FROM)
    return instructions


def _instructions(text: str) -> Iterator[Instruction]:
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, *rest = line.split(None, 1)
        if (name := word.upper()) not in _COMMANDS or not rest:
            raise ConfigError(f"line {number}: {word[:40]!r} is no instruction with a value.")
        value = rest[0].strip()
        # Of a parameter and a message, the text follows another word.
        words = value.split(None, 1) if name in {"PARAMETER", "MESSAGE"} else ["", value]
        head, begun = words[0], words[1] if len(words) > 1 else ""
        text = _text(begun, lines, number)
        yield Instruction(name, f"{head} {text}" if head else text, number)


def _text(begun: str, lines: Iterator[tuple[int, str]], number: int) -> str:
    """Return a text, which goes on over the lines up to its closing quote."""
    quote = next((mark for mark in (_FENCE, '"') if begun.startswith(mark)), "")
    if not quote:
        return begun
    text = begun[len(quote) :]
    while not text.rstrip().endswith(quote):
        if (following := next(lines, None)) is None:
            raise ConfigError(f"line {number}: the text has no closing {quote}.")
        text += f"\n{following[1]}"
    return text.rstrip().removesuffix(quote)


class _Target(NamedTuple):
    """The settings that are made, what is left out of them, and the settings that there are."""

    settings: dict[str, Any]
    left: dict[str, str]
    known: set[str]

    def put(self, label: str, key: str, value: Any) -> None:
        """Store a setting, if there is one of this name."""
        if key in self.known:
            self.settings[key] = value
        else:
            self.left[label] = f"there is no setting {key}; send it with each request"


def imported(text: str, folder: Path, models: Mapping[str, str], known: set[str]) -> Imported:
    """Return the settings of a Modelfile in `folder`.

    `models` are the references of the configured models, by name; `known` are the settings that
    a model can have.

    Raises:
        ConfigError: it is damaged, has a value of the wrong kind, no model, or an adapter that is
            not there or for a model of the configuration.
    """
    instructions = read(text)
    sources = [item for item in instructions if item.name == "FROM"]
    projectors = [item for item in sources if len(sources) > 1 and _is_projector(item, folder)]
    source, *more = [item for item in sources if item not in projectors] or sources
    if more or len(projectors) > 1:
        raise ConfigError(_ONE_FROM)
    left = {item.name: _LEFT[item.name] for item in instructions if item.name in _LEFT}
    target = _Target({}, left, known)
    name = _put_model(target, source, folder, models)
    for item in projectors:
        target.settings["options"] = {"mmproj": str(_path(item, folder).resolve())}
    if systems := [item.value for item in instructions if item.name == "SYSTEM"]:
        target.put("SYSTEM", "system", systems[-1])
    _put_adapters(target, [item for item in instructions if item.name == "ADAPTER"], folder)
    _put_parameters(target, [item for item in instructions if item.name == "PARAMETER"])
    return Imported(name=name, settings=target.settings, left_out=left)


def _path(item: Instruction, folder: Path) -> Path:
    return folder / Path(item.value).expanduser()


def _is_projector(item: Instruction, folder: Path) -> bool:
    try:
        return bool(projector.read(_path(item, folder)).path)
    except LoadFailed:
        return False


def _put_model(
    target: _Target, source: Instruction, folder: Path, models: Mapping[str, str]
) -> str:
    """Store the setting that has the model, and return a name for it, or none."""
    value, settings = source.value, target.settings
    if value in models:
        has_base = "base" in target.known
        settings["base" if has_base else "model"] = value if has_base else models[value]
        return ""
    path = _path(source, folder)
    if path.exists():
        settings["model"] = str(path.resolve())
        return "" if path.name.startswith("sha256") else path.stem
    if value.startswith((".", "/", "~")):
        raise ConfigError(f"line {source.line}: FROM: there is no {path}.")
    settings["model"] = _reference(target, source)
    return value.rpartition("/")[2].partition(":")[0]


def _put_adapters(target: _Target, adapters: Sequence[Instruction], folder: Path) -> None:
    made: dict[str, str] = {}
    for item in adapters:
        path = _path(item, folder)
        if not path.exists():
            raise ConfigError(f"line {item.line}: ADAPTER: there is no {path}.")
        if "base" in target.settings:
            table = f"[models.{target.settings['base']}.adapters]"
            raise ConfigError(f"line {item.line}: ADAPTER: its place is {table}.")
        made[path.stem] = str(path.resolve())
    if made:
        target.put("ADAPTER", "adapters", made)
        names = " and ".join(f"NAME:{name}" for name in made)
        target.left.setdefault("ADAPTER", f"requests name it {names}; NAME is without it")


def _reference(target: _Target, source: Instruction) -> str:
    value = source.value
    if (weights := ollama_weights(value)) is not None:
        return str(weights)
    with contextlib.suppress(InvalidRequest, UnknownModel):
        # What reads like a path, and is none, is a name of Ollama.
        if not isinstance(reference := parse(value), LocalReference):
            return str(reference)
    try:
        reference = str(parse(f"ollama:{value}"))
    except InvalidRequest as error:
        raise ConfigError(f"line {source.line}: FROM: {error.message}") from error
    target.left["FROM"] = f"no file of {value} is on this machine: a running Ollama will answer"
    return reference


def _put_parameters(target: _Target, parameters: list[Instruction]) -> None:
    sampling: dict[str, Any] = {}
    stops: list[str] = []
    for item in parameters:
        name, _, value = item.value.partition(" ")
        if not value:
            raise ConfigError(f"line {item.line}: {name[:80]!r} has no value.")
        if name == "stop":
            stops.append(value)
        elif name in _SAMPLING and not (name == "num_predict" and value.startswith("-")):
            key, kind = _SAMPLING[name]
            sampling[key] = _number(item, kind, value)
        else:
            _put_setting(target, item, name, value)
    if stops and "defaults" in target.known:
        sampling["stop"] = stops
    elif stops:
        target.settings["stop"] = stops
    if sampling:
        _check(sampling)
        target.put(f"PARAMETER {', '.join(sampling)}", "defaults", sampling)


def _put_setting(target: _Target, item: Instruction, name: str, value: str) -> None:
    settings = target.settings
    if "base" in settings and (name == "num_ctx" or name in _OPTIONS):
        target.left[f"PARAMETER {name}"] = f"the loaded model is that of {settings['base']}"
    elif name == "num_ctx":
        settings["context_length"] = _number(item, int, value, least=1)
    elif name == "num_predict":
        target.left[f"PARAMETER {name}"] = "without a limit is the default"
    elif name in _OPTIONS and _is_gguf(settings.get("model", "")) and not value.startswith("-"):
        options = settings.setdefault("options", {})
        options[_OPTIONS[name]] = _number(item, int, value, least=0)
    else:
        target.left[f"PARAMETER {name}"] = "it has no setting here"


def _number(
    item: Instruction, kind: Number, text: str, *, least: float | None = None
) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"line {item.line}: {item.value[:80]!r} has no number.") from None
    if least is not None and value < least:
        raise ConfigError(f"line {item.line}: {item.value[:80]!r} is less than {least}.")
    return value


def _check(sampling: dict[str, Any]) -> None:
    values: dict[str, Any] = {**sampling, "stop": tuple(sampling.get("stop", ()))}
    try:
        Sampling(**values)
    except InvalidRequest as error:
        raise ConfigError(f"PARAMETER {error.param}: {error.message}") from error


def _is_gguf(reference: str) -> bool:
    return reference.lower().endswith(".gguf") or "/blobs/sha256-" in reference
