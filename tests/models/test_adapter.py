"""LoRA adapters are checked against their model before a library sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.adapters_made import TINY, gguf_adapter, peft_adapter
from tests.models import builders
from tests.models.builders import F32, STRING
from tests.tiny_gguf import tiny_gguf

from headrace.core.errors import LoadFailed
from headrace.core.model import ModelFile
from headrace.models.adapter import MAX_RANK, checked, inspect
from headrace.models.inspect import inspect as inspect_model

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> ModelFile:
    folder = tmp_path_factory.mktemp("model")
    return inspect_model(tiny_gguf(folder / "tiny.gguf", smollm2_path))


@pytest.fixture
def folder(tmp_path: Path) -> ModelFile:
    """A model of transformers with one layer of 8 inputs and 12 outputs."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensor = {"dtype": "F32", "shape": [12, 8], "data_offsets": [0, 384]}
    text = json.dumps({f"{QUERY}.weight": tensor}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(384)
    (path / "model.safetensors").write_bytes(content)
    return inspect_model(path)


def refusal(path: Path, model: ModelFile) -> str:
    with pytest.raises(LoadFailed) as caught:
        checked(path, model)
    assert str(path) in caught.value.message
    return caught.value.message


def test_an_adapter_that_fits(model: ModelFile, tmp_path: Path) -> None:
    """Issue 17.4: its rank, size and alpha are those of the file."""
    path = gguf_adapter(tmp_path / "a.gguf", 1, rank=4)
    file = checked(path, model)
    assert (file.format, file.rank, file.alpha) == ("gguf", 4, 4.0)
    assert file.size == path.stat().st_size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "qwen2"}, "made for qwen2, and the model is llama"),
        ({"layers": {"blk.9.ffn_up.weight": (32, 64)}}, "'blk.9.ffn_up.weight', which the model"),
        ({"layers": {"blk.0.ffn_up.weight": (48, 64)}}, "32 x 64 in the model, and 48 x 64 in it"),
        ({"layers": {"blk.0.attn_q.weight": (32, 16)}}, "32 x 32 in the model, and 32 x 16 in it"),
        ({"rank": MAX_RANK + 1}, "has rank 513; 512 is the most"),
        ({"pairs": [("general.type", STRING, "model")]}, "its general.type is 'model'"),
        ({"pairs": [("adapter.type", STRING, "dora")]}, "no LoRA adapter"),
        ({"pairs": [("adapter.lora.alpha", F32, float("nan"))]}, "its alpha is no number"),
    ],
)
def test_an_adapter_of_another_model(
    changes: dict[str, Any], reason: str, model: ModelFile, tmp_path: Path
) -> None:
    """Issue 17.4: refused with the difference."""
    assert reason in refusal(gguf_adapter(tmp_path / "a.gguf", 1, **changes), model)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([("blk.0.attn_q.weight.lora_a", (32, 2), 0)], "has one of two matrices"),
        ([("blk.0.attn_q.weight", (32, 32), 0)], "is no matrix of a LoRA adapter"),
        (
            [("x.weight.lora_a", (32, 2), 0), ("x.weight.lora_b", (3, 32), 0)],
            "have the ranks 2 and 3",
        ),
        ([("x.weight.lora_a", (32,), 0), ("x.weight.lora_b", (32,), 0)], "are 32 and 32"),
        ([], "there are no matrices in it"),
    ],
)
def test_matrices_that_are_none(
    tensors: list[builders.Tensor], reason: str, model: ModelFile, tmp_path: Path
) -> None:
    """Issue 17.4: what llama.cpp would refuse, or would not."""
    pairs = [
        ("general.architecture", STRING, "llama"),
        ("general.type", STRING, "adapter"),
        ("adapter.type", STRING, "lora"),
    ]
    path = tmp_path / "a.gguf"
    path.write_bytes(builders.gguf(pairs, tensors))
    assert reason in refusal(path, model)


def test_damaged_files(model: ModelFile, tmp_path: Path) -> None:
    """Issue 17.4: cut anywhere, or with other bytes, it is refused or harmless."""
    whole = gguf_adapter(tmp_path / "a.gguf", 1).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(LoadFailed):
            inspect(path)
    for place in range(0, 600, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            checked(path, model)
        except LoadFailed as error:
            assert "cut.gguf" in error.message


def test_the_wrong_kind(model: ModelFile, folder: ModelFile, tmp_path: Path) -> None:
    """Issue 17.4: named, with what makes the right one."""
    peft = peft_adapter(tmp_path / "peft", 1, layers={QUERY: (8, 12)})
    assert "convert_lora_to_gguf.py makes one" in refusal(peft, model)
    gguf = gguf_adapter(tmp_path / "a.gguf", 1)
    assert "needs a folder of PEFT: with adapter_config.json" in refusal(gguf, folder)
    text = tmp_path / "text.txt"
    text.write_text("hello")
    assert "neither a GGUF file nor a folder" in refusal(text, model)
    assert "there is no adapter_config.json in it" in refusal(tmp_path, model)


def test_a_folder_of_peft(folder: ModelFile, tmp_path: Path) -> None:
    """Issue 17.4: its matrices go with the model's layers, inputs and outputs."""
    file = checked(peft_adapter(tmp_path / "fits", 1, layers={QUERY: (8, 12)}), folder)
    assert (file.format, file.rank, file.alpha, file.root_rank) == ("safetensors", 2, 2.0, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
        ({"use_dora": True}, "with use_dora is not supported"),
        ({"bias": "all"}, "with bias is not supported"),
        ({"lora_bias": True}, "with lora_bias is not supported"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "with layer_replication is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights (PEFT can save it"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save is not supported"),
        ({"alpha_pattern": {"q_proj": 4}}, "with alpha_pattern is not supported"),
        ({"lora_alpha": "x"}, "lora_alpha in adapter_config.json is no number"),
        ({"layers": {QUERY: (8, 13)}}, "8 x 12 in the model, and 8 x 13 in it"),
        ({"layers": {"model.embed": (8, 12)}}, "'model.embed', which the model does not have"),
        ({"rank": 600}, "has rank 600; 512 is the most"),
    ],
)
def test_a_folder_of_peft_that_does_not_fit(
    changes: dict[str, Any], reason: str, folder: ModelFile, tmp_path: Path
) -> None:
    """Issue 17.4: what is not computed is refused by its name."""
    given: dict[str, Any] = {"layers": {QUERY: (8, 12)}} | changes
    assert reason in refusal(peft_adapter(tmp_path / "peft", 1, **given), folder)


def test_a_pickle_is_not_loaded(folder: ModelFile, tmp_path: Path) -> None:
    """Issue 17.4: an adapter_model.bin could run any code."""
    path = peft_adapter(tmp_path / "peft", 1, layers={QUERY: (8, 12)})
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "there is no adapter_model.safetensors in it" in refusal(path, folder)


def test_tiny_layers_are_those_of_the_model(model: ModelFile, tmp_path: Path) -> None:
    """The layers that the tests change are there: else each refusal above could be another."""
    assert checked(gguf_adapter(tmp_path / "a.gguf", 1, layers=TINY), model).rank == 2
