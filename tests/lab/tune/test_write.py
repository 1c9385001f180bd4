"""The user's file stays his: only what was found is written, or nothing at all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import ConfigError
from headrace.lab.tune.write import edited, save

FILE = """\
# My models.
log_level = "warning"  # quiet

[models.smollm2]
# asked for by Ann
engine = "llamacpp"
keep_alive = "5m"

[models.smollm2.options]
threads = 2

# The other one.
[models."Qwen2.5"]
model = "hub:Qwen/Qwen2.5"
"""


def test_only_the_lines_of_the_model_change() -> None:
    after = edited(FILE, "smollm2", {"engine": "openvino", "options": {"slots": 8}}, "tuned")
    assert after == (
        FILE.replace('engine = "llamacpp"\n', "")
        .replace("[models.smollm2]\n", '[models.smollm2]\nengine = "openvino"  # tuned\n')
        .replace("threads = 2", "slots = 8")
    )


def test_a_second_time_nothing_is_left_of_the_first() -> None:
    once = edited(FILE, "smollm2", {"engine": "openvino", "options": {"slots": 8}}, "one")
    twice = edited(once, "smollm2", {"engine": "llamacpp", "options": {}}, "two")
    assert tomllib.loads(twice)["models"]["smollm2"] == {"engine": "llamacpp", "keep_alive": "5m"}
    assert "one" not in twice.replace("other one", "")
    assert edited(twice, "smollm2", {"engine": "llamacpp", "options": {}}, "two") == twice


def test_a_name_with_a_dot_is_found() -> None:
    after = edited(FILE, "Qwen2.5", {"engine": "vllm", "options": {"a": True}}, "tuned")
    assert tomllib.loads(after)["models"]["Qwen2.5"] == {
        "model": "hub:Qwen/Qwen2.5",
        "engine": "vllm",
        "options": {"a": True},
    }
    assert after.startswith(FILE[: FILE.index('[models."Qwen')])


def test_an_empty_file_gets_a_table() -> None:
    assert edited("", "x", {"model": "./x.gguf", "engine": "echo", "options": {}}, "tuned") == (
        '[models.x]\nmodel = "./x.gguf"\nengine = "echo"  # tuned\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        'models = { smollm2 = { engine = "echo" } }\n',
        '[models]\nsmollm2 = { engine = "echo" }\n',
        'models.smollm2.engine = "echo"\n',
        '[models.smollm2]\nstop = [\n  "a",\n  "engine = 1",\n]\nengine = """\necho"""\n',
    ],
)
def test_what_is_not_understood_is_refused_with_what_to_write(text: str) -> None:
    """Better no edit than a wrong one."""
    with pytest.raises(ConfigError, match=r"\[models.smollm2\]\nengine = \"openvino\""):
        edited(text, "smollm2", {"engine": "openvino", "options": {"slots": 8}}, "tuned")


names = st.text(st.sampled_from('ab.-" é#='), min_size=1, max_size=5)
plain = st.one_of(st.integers(-9, 9), st.booleans(), names)


@settings(max_examples=60, deadline=None)
@given(model=names, engine=names, options=st.dictionaries(names, plain, max_size=3))
def test_whatever_is_written_means_what_was_meant(
    model: str, engine: str, options: dict[str, object]
) -> None:
    """It is edited rightly or refused; it is never damaged."""
    after = edited(FILE, model, {"engine": engine, "options": options}, "tuned")
    found = tomllib.loads(after)
    before = tomllib.loads(FILE)
    assert found["models"][model]["engine"] == engine
    assert found["models"][model].get("options", {}) == options
    for name in before["models"].keys() - {model}:
        assert found["models"][name] == before["models"][name]
    assert all(line in after for line in FILE.splitlines() if line.startswith("#"))


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    place = tmp_path / "real.toml"
    place.write_text("")
    link = tmp_path / "headrace.toml"
    link.symlink_to(place)
    save(link, FILE)
    assert link.is_symlink()
    assert place.read_text() == FILE
    save(tmp_path / "new" / "headrace.toml", FILE)
    with pytest.raises(ConfigError, match=r"headrace\.toml"):
        save(place / "headrace.toml", FILE)
