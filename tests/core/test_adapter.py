"""Adapters in the configuration: references or tables, and names that nothing else has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import runtime
from headrace.config import Settings
from headrace.core.adapter import MAX_ADAPTERS, Adapter, checked_adapters
from headrace.core.errors import ConfigError
from headrace.core.model import ModelSpec, needs_new_worker
from headrace.core.preset import addressed
from headrace.core.request import GenerateRequest
from headrace.pool.policy import blocks_of

TABLE = """
[models.base]
model = "./base.gguf"
{keys}

[models.base.adapters]
{adapters}
"""


def settings(path: Path, adapters: str, keys: str = "", more: str = "") -> Settings:
    file = path / "headrace.toml"
    file.write_text(TABLE.format(adapters=adapters, keys=keys) + more)
    return runtime.load_settings(file=file, environ={"HOME": str(path)})


def test_references_and_tables(tmp_path: Path) -> None:
    """Issue 17.4: relative paths begin at the file, as those of models do."""
    given = 'one = "./one.gguf"\ntwo = {source = "hub:org/two", scale = 0.5, name = "own"}'
    spec = settings(tmp_path, given).config.models["base"]
    assert spec.adapters == {
        "one": Adapter(source=str(tmp_path / "one.gguf")),
        "two": Adapter(source="hub:org/two", scale=0.5, name="own"),
    }
    assert spec.names == ("base", "base:one", "own", "base:two")
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec)
    assert again == spec
    assert settings(tmp_path, given).resolve("own") == ("base", "base")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": ""}, "a is a reference, or a table with a source"),
        ({"a": {"path": "x"}}, "a.path is none of source, scale, name"),
        ({"a": {"source": "x", "scale": 0}}, "a.scale is a number up to 100, and not 0"),
        ({"a": {"source": "x", "scale": float("nan")}}, "a.scale is a number"),
        ({"a": {"source": "x", "scale": True}}, "a.scale is a number"),
        ({"a": {"source": "x", "name": " "}}, "a.name is a text"),
        ({"a\n": "x"}, "1 to 128 characters"),
        ({str(n): "x" for n in range(MAX_ADAPTERS + 1)}, "at most 64 adapters"),
    ],
)
def test_values_that_are_not_accepted(value: Any, reason: str) -> None:
    """Issue 17.4: by the name of the adapter and of its key."""
    with pytest.raises(ValueError, match=reason):
        checked_adapters(value)


@pytest.mark.parametrize(
    ("adapters", "keys", "more"),
    [
        ('a = {source = "x", name = "base"}', "", ""),
        ('a = {source = "x", name = "other"}', "", '[models.other]\nmodel = "echo"'),
        ('a = "x"', "", '[models."base:a"]\nmodel = "echo"'),
        ('a = "x"', 'aliases = ["base:a"]', ""),
        ('a = {source = "x", name = "s"}\nb = {source = "y", name = "s"}', "", ""),
        ('a = {source = "x", name = "base:b"}\nb = "y"', "", ""),
    ],
)
def test_a_name_of_two(adapters: str, keys: str, more: str, tmp_path: Path) -> None:
    """Issue 17.4: refused at the start, as with Ollama's `name:tag`."""
    with pytest.raises(ConfigError, match="is the name of"):
        settings(tmp_path, adapters, keys, more)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ('engine = "echo"', "Engine echo has no LoRA adapters; .*llamacpp"),
        ('task = "embed"', "Adapters go with the task generate"),
    ],
)
def test_what_has_no_adapters(keys: str, reason: str, tmp_path: Path) -> None:
    """Issue 17.4: refused by its name when the configuration is read."""
    with pytest.raises(ConfigError, match=reason):
        settings(tmp_path, 'a = "x"', keys)


def test_a_model_at_another_service_has_none(tmp_path: Path) -> None:
    """Issue 17.4: its adapters are names there."""
    with pytest.raises(ConfigError, match="has its adapters there"):
        settings(tmp_path, 'a = "x"').changed("base", {}, ()).__class__  # noqa: B018
        runtime.load_settings(environ={"HOME": str(tmp_path)}).model_spec(
            "ollama:qwen3", {"adapters": {"a": "x"}}
        )


def test_a_request_has_the_adapter_of_its_name() -> None:
    """Issue 17.4: by each name; what a prompt shares of a cache is not that of another."""
    adapters = {"a": Adapter(source="x"), "b": Adapter(source="y", name="own")}
    spec = ModelSpec(name="m", model="x", aliases=("n",), adapters=adapters)

    def asked(name: str) -> tuple[str, str, tuple[int, ...]]:
        request = addressed(spec, GenerateRequest(model=name, prompt="x" * 4000))
        return request.adapter, request.model, blocks_of(request)

    found = {name: asked(name) for name in ("m", "n", "m:a", "own", "m:b")}
    assert {name: entry[:2] for name, entry in found.items()} == {
        "m": ("", "m"),
        "n": ("", "n"),
        "m:a": ("a", "m:a"),
        "own": ("b", "own"),
        "m:b": ("b", "own"),
    }
    assert len({entry[2] for entry in found.values()}) == 3
    assert len({entry[2][0] for entry in found.values()}) == 3


def test_a_change_needs_a_new_worker() -> None:
    """Issue 17.4: the engines take adapters when they load."""
    spec = ModelSpec(name="m", model="x")
    changed = msgspec.structs.replace(spec, adapters={"a": Adapter(source="x")})
    assert needs_new_worker(spec, changed)


def test_adapters_one_by_one(tmp_path: Path) -> None:
    """Issue 17.4: changes at run time add to those of the file, or take from them."""
    given = settings(tmp_path, 'a = "hub:x/y"\nb = {source = "./b", scale = 2}')

    def changed(**changes: Any) -> dict[str, Adapter]:
        return given.changed(
            "base", {f"adapters.{key}": to for key, to in changes.items()}
        ).adapters

    assert list(changed(c={"source": "/c", "scale": 0.5, "name": None})) == ["a", "b", "c"]
    assert changed(c="/c")["c"] == Adapter(source="/c")
    assert list(changed(a=False)) == ["b"]
    assert list(changed(a=None)) == ["a", "b"]
    assert changed(b="/other")["b"] == Adapter(source="/other")
    assert changed(c={"source": "/c", "name": "own"})["b"].source == str(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"c\.sourse is none of source"):
        changed(c={"sourse": "/c"})
    whole = given.changed("base", {"adapters": '{"d": "/d"}', "adapters.e": "/e"})
    assert list(whole.adapters) == ["d", "e"]
