"""The typed keyword arguments are those that are declared elsewhere."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tests.conftest import ROOT

from headrace import engines
from headrace.core.constraint import ANY_FORM, Constraint
from headrace.core.model import SETTINGS, ModelSpec
from headrace.core.options import EmbedOptions, GenerateOptions, ModelOptions, RerankOptions
from headrace.core.request import EmbedRequest, GenerateRequest, RerankRequest
from headrace.core.sampling import Sampling

# Taken in several forms, of which a test of workers has each.
_CONVERSATION = {"tools", "tool_choice", "parallel_tool_calls", "thinking"}
_REQUEST = {
    *("n", "echo", "context_length", "template_options", "deadline_s"),
    *("suffix", "continue_final", "prompt_logprobs", "adapter"),
}


def plain(hint: Any) -> set[Any]:
    """The kinds of values that a type has; None is left out."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in plain(part)}
    if origin is Annotated:
        return plain(get_args(hint)[0])
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin in (tuple, list, Sequence):
        return {Sequence}
    if origin in (dict, Mapping):
        return {Mapping}
    named = {"SecretStr": str, "NoneType": None}
    kind = named.get(hint.__name__, hint)
    return {kind} if kind else set()


def widened(kinds: set[Any]) -> set[Any]:
    return kinds - {int} if float in kinds else kinds


def test_the_arguments_of_generate() -> None:
    """Issue 12.23: those of Sampling, and fields of the request."""
    typed = get_type_hints(GenerateOptions)
    of_request = get_type_hints(GenerateRequest)
    declared = get_type_hints(Sampling) | {name: of_request[name] for name in _REQUEST}
    declared |= {form: get_type_hints(Constraint)[form] for form in ANY_FORM}
    assert typed.keys() == declared.keys() | _CONVERSATION
    for name, hint in typed.items():
        if name in _CONVERSATION:
            continue
        assert plain(hint) - ({str} if name == "stop" else set()) == plain(declared[name]), name


def test_the_arguments_of_embed_and_rerank() -> None:
    """Issue 12.23: what may be set of their requests."""
    for options, request in ((EmbedOptions, EmbedRequest), (RerankOptions, RerankRequest)):
        declared = get_type_hints(request)
        for name, hint in get_type_hints(options).items():
            assert plain(hint) == plain(declared[name]), name


def test_the_arguments_of_a_worker() -> None:
    """Issue 12.23: the settings of a model, and the options of all engines."""
    typed = get_type_hints(ModelOptions)
    settings = get_type_hints(ModelSpec)
    declared = {name: plain(settings[name]) for name in SETTINGS if name != "model"}
    declared["keep_alive"].add(str)  # as `5m`
    for engine in engines.names():
        for name, field in engines.options(engine).model_fields.items():
            declared[name] = declared.get(name, set()) | plain(field.annotation)
    assert typed.keys() == declared.keys()
    for name, hint in typed.items():
        assert plain(hint) == widened(declared[name]), name


PROGRAM = """
from headrace import AsyncModelWorker, ModelWorker

worker = ModelWorker("echo", context_length=256, slots=2)
worker.generate("a", max_tokens=5, stop="x", temperature=0)
worker.generate("a", max_tokenz=5)
worker.generate_stream("a", temperature="hot")
worker.embed(["a"], dimension=3)
worker.rerank("a", ["b"], top_k=3)
AsyncModelWorker("echo", context_lenght=256)
AsyncModelWorker("echo").generate_stream("a", stopp="x")
"""


def test_a_type_checker_finds_wrong_arguments(tmp_path: Path) -> None:
    """Issue 12.23: `max_tokenz=5` is an error before the program runs."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"typeCheckingMode": "standard", "extraPaths": ["{ROOT / "src"}"]}}'
    )
    checker = Path(sys.executable).parent / "basedpyright"
    done = subprocess.run(
        [str(checker), "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if " error: " in line]
    places = [int(line.split(":")[1]) for line in lines]
    assert places == [6, 7, 8, 9, 10, 11], done.stdout
    for name in ("max_tokenz", "temperature", "dimension", "top_k", "context_lenght", "stopp"):
        assert any(name in line for line in lines), name
