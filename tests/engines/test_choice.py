"""Which engine is chosen, and what is said of it; nothing here is installed or loaded."""

from __future__ import annotations

import pytest

from headrace.core.errors import ConfigError
from headrace.core.model import Task
from headrace.engines.base import About
from headrace.engines.choice import Candidate, Requirements, choose

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
def test_format_task_and_device_decide(requirements: Requirements, chosen: str) -> None:
    """W2: by format, task, device, and the options that are set."""
    assert choose(requirements, ALL)[0] == chosen


def test_the_order_and_what_is_missing_are_said() -> None:
    """W2: never a silent guess."""
    reason = choose(Requirements(format="gguf"), ALL)[1]
    assert reason == "gguf on cpu: llamacpp, before openvino (`headrace tune` compares them)"
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
