"""The cases of adapters fail with an engine that mixes them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.adapters_made import gguf_adapter
from tests.tiny_gguf import tiny_gguf

from headrace import runtime
from headrace.engines.base import EngineRequest
from headrace.engines.llamacpp.served import Served
from headrace.lab import cases as contract
from headrace.lab.cases import adapters

Lora = Callable[[Served, EngineRequest], Sequence[dict[str, float]]]
_sound: Lora = Served._lora  # pyright: ignore[reportPrivateUsage]


def _always_the_first(engine: Served, request: EngineRequest) -> Sequence[dict[str, float]]:
    return [given | {"scale": float(not given["id"])} for given in _sound(engine, request)]


def _only_what_is_wanted(engine: Served, request: EngineRequest) -> Sequence[dict[str, float]]:
    # llama.cpp keeps the cache of a prompt then, whatever it was computed with.
    return [given for given in _sound(engine, request) if given["scale"]]


@pytest.mark.parametrize(
    ("spoiled", "result"),
    [(_sound, "ok"), (_always_the_first, "failed"), (_only_what_is_wanted, "failed")],
)
async def test_a_spoiled_engine_is_caught(
    spoiled: Lora, result: str, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.4: an adapter for all requests, and a cache that all adapters share."""
    monkeypatch.setattr(Served, "_lora", spoiled)
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(tmp_path)})
    model = tiny_gguf(tmp_path / "tiny.gguf", smollm2_path)
    given: dict[str, Any] = {
        "adapters": {
            name: str(gguf_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")
        },
        "context_length": 256,
        "options": {"slots": 1, "threads": 1},
    }
    spec = settings.model_spec(str(model), given)
    async with contract.opened("llamacpp", spec, settings, "worker") as subject:
        outcome = await contract.examine(adapters.adapters, subject)
    assert outcome.result == result, outcome.why
