"""Which engine is chosen, and what is said of it; nothing here is installed or loaded."""

from __future__ import annotations

import pytest

from headrace.core.errors import ConfigError
from headrace.core.model import Task
from headrace.engines.base import About
from headrace.engines.choice import Candidate, Measured, Requirements, choose

BOTH: tuple[Task, ...] = ("generate", "embed")


def engine(
    name: str,
    *formats: str,
    devices: tuple[str, ...] = ("cpu",),
    tasks: tuple[Task, ...] = ("generate",),
    missing: str | None = None,
    automatic: bool = True,
    options: tuple[str, ...] = (),
) -> Candidate:
    about = About(formats=formats, devices=devices, tasks=tasks, automatic=automatic)
    return Candidate(name=name, about=about, missing=missing, options=frozenset(options))


LLAMACPP = engine("llamacpp", "gguf", devices=("cpu", "cuda"), tasks=BOTH, options=("slots",))
OPENVINO = engine("openvino", "gguf", "safetensors", tasks=BOTH, options=("precision",))
TRANSFORMERS = engine("transformers", "safetensors", devices=("cpu", "cuda"))
VLLM = engine("vllm", "safetensors", devices=("cuda",))
SENTENCES = engine("sentence_transformers", "safetensors", tasks=("embed",))
ALL = (LLAMACPP, OPENVINO, SENTENCES, TRANSFORMERS, VLLM)


def found(
    engine: str, alone: float, many: float, fault: str | None = None, best: float | None = None
) -> Measured:
    rates = {1: alone, 32: many}
    most = {1: best or alone, 32: best or many}
    return Measured(engine=engine, day="2026-11-22", rates=rates, best=most, fault=fault)


@pytest.mark.parametrize(
    ("requirements", "chosen"),
    [
        (Requirements(format="gguf"), "llamacpp"),
        (Requirements(format="gguf", device="cuda"), "llamacpp"),
        (Requirements(format="safetensors"), "transformers"),
        (Requirements(format="safetensors", device="cuda"), "vllm"),
        (Requirements(format="safetensors", task="embed"), "sentence_transformers"),
        (Requirements(format="gguf", task="embed"), "llamacpp"),
        (Requirements(format="gguf", options=frozenset({"precision"})), "openvino"),
    ],
)
def test_without_a_measurement_format_task_and_device_decide(
    requirements: Requirements, chosen: str
) -> None:
    """W2: by format, task, device, and the options that are set."""
    assert choose(requirements, ALL)[0] == chosen


def test_the_order_and_what_is_missing_are_said() -> None:
    """W2: never a silent guess."""
    reason = choose(Requirements(format="gguf"), ALL)[1]
    assert reason == (
        "gguf on cpu: llamacpp, before openvino; nothing was measured here (`headrace tune`)"
    )
    hint = "not installed: pip install 'headrace[vllm]'"
    gone = engine("vllm", "safetensors", devices=("cuda",), missing=hint)
    name, reason = choose(Requirements(format="safetensors", device="cuda"), (TRANSFORMERS, gone))
    assert name == "transformers"
    assert reason == f"safetensors on cuda: transformers; vllm would come first, {hint}"


def test_a_device_that_must_be_leaves_out_who_cannot() -> None:
    requirements = Requirements(format="gguf", device="cuda", required_device="cuda")
    assert choose(requirements, (OPENVINO, LLAMACPP))[0] == "llamacpp"
    with pytest.raises(ConfigError, match=r"format gguf on cuda.*openvino reads gguf"):
        choose(requirements, (OPENVINO,))


def test_what_is_not_automatic_is_never_chosen() -> None:
    by_name = engine("remote", "gguf", automatic=False)
    with pytest.raises(ConfigError):
        choose(Requirements(format="gguf"), (by_name,))


def test_an_option_that_nobody_knows_leaves_the_choice_as_it_was() -> None:
    """W3: whoever is chosen then refuses it by name."""
    assert choose(Requirements(format="gguf", options=frozenset({"slotz"})), ALL)[0] == "llamacpp"


def test_the_faster_one_alone_is_chosen_and_the_figures_are_said() -> None:
    measured = [found("llamacpp", 100, 180), found("openvino", 80, 450)]
    name, reason = choose(Requirements(format="gguf"), ALL, measured)
    assert name == "llamacpp"
    assert reason == (
        "gguf on cpu: llamacpp; measured here on 2026-11-22, tokens/s alone: llamacpp 100, "
        "openvino 80; for 32 streams at once openvino has 2.5 times as many"
    )
    assert choose(Requirements(format="gguf"), ALL, [found("llamacpp", 50, 1), measured[1]])[0] == (
        "openvino"
    )


def test_one_whose_answers_differ_is_not_chosen_however_fast() -> None:
    """Issue 4: an engine that does not agree is not chosen, and why is said."""
    measured = [found("llamacpp", 50, 90), found("openvino", 500, 900, "0.4 of its tokens agree")]
    name, reason = choose(Requirements(format="gguf"), ALL, measured)
    assert name == "llamacpp"
    assert reason.endswith("not openvino: 0.4 of its tokens agree")
    assert (
        choose(Requirements(format="gguf"), ALL, [found("llamacpp", 9, 9, "junk")])[0] == "openvino"
    )


def test_a_measurement_of_others_alone_decides_nothing() -> None:
    """The usual engine came later, or was not measured: nobody knows that it is slower."""
    name, reason = choose(Requirements(format="gguf"), ALL, [found("openvino", 500, 900)])
    assert name == "llamacpp"
    assert "nothing was measured" in reason
