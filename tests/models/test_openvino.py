"""A folder of OpenVINO's is checked before the library sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.core.errors import LoadFailed
from headrace.models.inspect import inspect

GRAPH = """<?xml version="1.0"?>
<net name="m" version="11"><layers>
<layer id="0" name="input_ids" type="Parameter" version="opset1"><data shape="?,?"/></layer>
<layer id="1" name="{more}" type="Parameter" version="opset1"><data shape="?"/></layer>
<layer id="2" name="w" type="Const" version="opset1">
<data element_type="f16" shape="4, 8" offset="{offset}" size="64"/></layer>
</layers></net>"""


def made(path: Path, *, more: str = "beam_idx", offset: int = 0) -> Path:
    path.mkdir(exist_ok=True)
    for name in ("model", "tokenizer", "detokenizer"):
        text = GRAPH.format(more=more, offset=offset if name == "model" else 0)
        (path / f"openvino_{name}.xml").write_text(text)
        (path / f"openvino_{name}.bin").write_bytes(bytes(64))
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "max_position_embeddings": 2048,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "hidden_size": 64,
            }
        )
    )
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return path


def test_a_sound_folder_tells_what_it_is(tmp_path: Path) -> None:
    found = inspect(made(tmp_path))
    assert (found.format, found.task, found.architecture) == ("openvino", "generate", "llama")
    assert (found.parameters, found.quantization, found.context_length) == (32, "F16", 2048)
    assert found.kv_bytes_per_token == 2 * 2 * 16 * 2 * 2
    assert found.chat_template == "{{ messages }}"


def test_the_task_is_that_of_the_graph_and_of_the_configuration(tmp_path: Path) -> None:
    made(tmp_path, more="attention_mask")
    assert inspect(tmp_path).task == "embed"
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    assert inspect(tmp_path).task == "rerank"


def test_the_length_of_an_embedder_is_its_own(tmp_path: Path) -> None:
    made(tmp_path, more="attention_mask")
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    assert inspect(tmp_path).context_length == 256


@pytest.mark.parametrize("offset", [1, 10**12, -8])
def test_a_constant_outside_of_the_weights_is_refused(tmp_path: Path, offset: int) -> None:
    with pytest.raises(LoadFailed, match="damaged"):
        inspect(made(tmp_path, offset=offset))


@pytest.mark.parametrize(
    "text",
    ['<!DOCTYPE a [<!ENTITY b "c">]><net name="m"/>', "<net/>", "", "<html></html>"],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, text: str) -> None:
    made(tmp_path)
    (tmp_path / "openvino_model.xml").write_text(text)
    with pytest.raises(LoadFailed):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "name", ["openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml"]
)
def test_a_missing_file_is_told_by_name(tmp_path: Path, name: str) -> None:
    made(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(LoadFailed, match=name):
        inspect(tmp_path)
