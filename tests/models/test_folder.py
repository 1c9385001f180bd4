from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.models.builders import safetensors

from headrace.core.errors import LoadFailed
from headrace.models import folder
from headrace.models.safetensors import read_header

TENSORS = {"a": ("F32", (2, 3), 24), "b": ("BF16", (4, 8), 64), "c": ("BF16", (), 2)}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def make(path: Path, config: dict[str, Any] = CONFIG, **files: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(safetensors(TENSORS, {"format": "pt"}))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


def test_tells_what_is_in_the_folder(tmp_path: Path) -> None:
    """W22: a folder of safetensors is described from its headers and its config."""
    model = folder.describe(make(tmp_path))
    assert (model.format, model.architecture, model.quantization) == (
        "safetensors",
        "llama",
        "BF16",
    )
    assert model.parameters == 6 + 32 + 1
    assert model.context_length == 4096
    assert model.kv_bytes_per_token == 2 * 2 * 8 * 2 * 2
    assert model.chat_template is None


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"max_position_embeddings": 2048}, {}, 2048),
        ({"n_positions": 1024}, {}, 1024),
        (
            {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}},
            {},
            8192,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "model_type": "gemma3_text",
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {},
            131072,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            {},
            131072,
        ),
        ({"text_config": {"max_position_embeddings": 77}}, {}, 77),
        ({}, {"model_max_length": 512}, 512),
        ({}, {"model_max_length": 1e30}, None),
        ({"max_position_embeddings": 100_000_000}, {"model_max_length": 9}, 9),
    ],
)
def test_context_length(tmp_path, config, tokenizer, expected) -> None:
    """W6: config before tokenizer, rope scaling counts, 1e8 and more are no limit."""
    make(tmp_path, config, tokenizer_config__json=tokenizer)
    assert folder.describe(tmp_path).context_length == expected


@pytest.mark.parametrize(
    "prompts", [{"query": "x" * (1 << 15)}, {"query": ["x"]}, {str(n): "" for n in range(257)}]
)
def test_prompts_have_limits(tmp_path: Path, prompts: Any) -> None:
    """Issue 17.6: they come before each text of each request."""
    (tmp_path / "modules.json").write_text("[]")
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {"query": "q: ", "other": None}}))
    found = folder.prompts_of(tmp_path)["prompts"]
    assert found == {"query": "q: ", "document": "", "other": ""}
    file.write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(LoadFailed, match="prompts"):
        folder.prompts_of(tmp_path)


HUGE = 10**400
SIZES = dict.fromkeys(
    ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), (1 << 32) - 1
)


@pytest.mark.parametrize(
    "config",
    [
        SIZES,
        {"model_type": "x" * 1_000_000},
        {"model_type": "\ud800"},
        {"model_type": "\x1b[2J"},
        {"architectures": [["x" * 1000]]},
        {"quantization_config": {"quant_method": {"x": "y" * 1000}}},
        {"x": [[]] * 2_000_001},
    ],
    ids=["cache", "long", "half", "terminal", "list", "method", "values"],
)
def test_an_absurd_configuration_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Issue 11.10: what it says was to be sent to other processes, which cannot be done."""
    make(tmp_path, config)
    with pytest.raises(LoadFailed, match=r"config\.json"):
        folder.describe(tmp_path)


def test_a_context_of_400_digits_is_none(tmp_path: Path) -> None:
    """Issue 11.10: it was an error as if by a bug."""
    scaling = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": HUGE}
    make(tmp_path, {"max_position_embeddings": 4096, "rope_scaling": scaling})
    assert folder.describe(tmp_path).context_length is None


@pytest.mark.parametrize(
    "absurd",
    [
        {"prompts": {"\ud800": "x"}},
        {"prompts": {"x" * 1000: "x"}},
        {"prompts": {}, "default_prompt_name": "x" * 1_000_000},
    ],
    ids=["half", "name", "default"],
)
def test_names_of_prompts_have_limits(tmp_path: Path, absurd: dict[str, Any]) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(absurd))
    with pytest.raises(LoadFailed, match="config_sentence_transformers"):
        folder.prompts_of(tmp_path)


def test_chat_template_has_three_homes(tmp_path: Path) -> None:
    """W25: the model's own template is found wherever it is kept."""
    make(tmp_path, tokenizer_config__json={"chat_template": "one"})
    assert folder.describe(tmp_path).chat_template == "one"
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "two"}]
    make(tmp_path, tokenizer_config__json={"chat_template": several})
    assert folder.describe(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert folder.describe(tmp_path).chat_template == "three"


def test_quantised_weights_are_named_and_not_counted(tmp_path: Path) -> None:
    make(tmp_path, CONFIG | {"quantization_config": {"quant_method": "gptq"}})
    model = folder.describe(tmp_path)
    assert (model.quantization, model.parameters) == ("gptq", None)


def test_the_index_names_the_files_and_all_have_to_be_there(tmp_path: Path) -> None:
    make(tmp_path, model__safetensors__index__json={"weight_map": {"a": "x.safetensors"}})
    with pytest.raises(LoadFailed, match=r"x\.safetensors: No such file"):
        folder.describe(tmp_path)
    make(tmp_path, model__safetensors__index__json={"weight_map": {"a": "../x.safetensors"}})
    with pytest.raises(LoadFailed, match="weight_map"):
        folder.describe(tmp_path)
    make(tmp_path, model__safetensors__index__json={"weight_map": {"a": "model.safetensors"}})
    assert folder.describe(tmp_path).parameters == 39


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 200_000, '{"a": ' * 100_000])
def test_a_broken_config_is_refused(tmp_path: Path, content: str) -> None:
    make(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadFailed, match=r"config\.json"):
        folder.describe(tmp_path)


def raw(header: object, data: int = 0) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"\0" * data


def tensor(begin: int, end: int, shape: object = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "short": b"\1\0\0",
    "length": struct.pack("<Q", 1 << 62) + b"{}",
    "not json": raw(b"{nonsense"),
    "deep": raw(b'{"a":' + b"[" * 300_000),
    "list": raw([]),
    "many": raw(b"{" + b'"a":1,' * 600_000),
    "none": raw({}),
    "gap": raw({"a": tensor(0, 4), "b": tensor(8, 12)}, 12),
    "overlap": raw({"a": tensor(0, 4), "b": tensor(2, 6)}, 6),
    "rest": raw({"a": tensor(0, 4)}, 8),
    "beyond": raw({"a": tensor(0, 4)}, 3),
    "shape": raw({"a": tensor(0, 4, (2,))}, 4),
    "negative": raw({"a": tensor(0, 4, (-1, -1))}, 4),
    "huge": raw({"a": tensor(0, 4, (1 << 60, 1 << 60))}, 4),
    "type": raw({"a": tensor(0, 4, (1,), "PICKLE")}, 4),
    "text": raw({"a": tensor(0, 4, "1")}, 4),
    "metadata": raw({"__metadata__": 5, "a": tensor(0, 4)}, 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_headers(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(LoadFailed, match="damaged safetensors"):
        read_header(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 255)), max_size=4),
)
def test_damage_is_refused_or_the_header_still_holds(tmp_path: Path, cut: int, flips) -> None:
    data = bytearray(safetensors(TENSORS, {"format": "pt"}))
    for place, byte in flips:
        data[place % len(data)] = byte
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(data[: len(data) - cut] if cut else data))
    try:
        header = read_header(file)
    except LoadFailed:
        return
    assert header.tensors in (1, 2, 3)
    assert header.size == file.stat().st_size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=8))
def test_sound_files_are_read(tmp_path: Path, shapes: list[list[int]]) -> None:
    tensors = {f"t{n}": ("F32", shape, 4 * math.prod(shape)) for n, shape in enumerate(shapes)}
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(tensors))
    assert read_header(file).weights == {"F32": sum(math.prod(shape) for shape in shapes)}
