"""Presets: what requests get that they do not set, and several names of one loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import runtime
from headrace.config import Settings
from headrace.core.errors import ConfigError, InvalidRequest
from headrace.core.model import ModelSpec, Preset, needs_new_worker
from headrace.core.preset import applied
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, collect_count
from headrace.core.tools import Thinking

FILE = """
[models.echo]
model = "builtin:echo"
defaults = {max_tokens = 5, temperature = 0.5}

[models.strict]
base = "echo"
system = "Be strict."
thinking = "off"
defaults = {temperature = 0, stop = "x"}
"""


def chat(**given: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", "abcdefghij"),), **given)


def settings(path: Path, text: str = FILE) -> Settings:
    file = path / "headrace.toml"
    file.write_text(text)
    return runtime.load_settings(file=file, environ={"HOME": str(path)})


def test_what_a_request_does_not_set_comes_from_the_preset() -> None:
    """Issue 13, presets: what it sets is its own."""
    preset = Preset(
        system="Be brief.", defaults={"temperature": 0.3, "stop": ["#"], "max_tokens": 9}
    )
    plain: Any = applied(preset, chat())
    assert plain.messages[0] == Message("system", "Be brief.")
    assert plain.sampling == Sampling(temperature=0.3, stop=("#",), max_tokens=9)
    assert plain.fit_max_tokens
    own = chat(sampling=Sampling(temperature=0.0, stop=("a",), max_tokens=2))
    kept: Any = applied(preset, own)
    assert (kept.sampling, kept.fit_max_tokens) == (own.sampling, False)
    for role in ("system", "developer"):
        begun = GenerateRequest(messages=(Message(role, "x"), Message("user", "y")))
        assert applied(preset, begun).messages == begun.messages  # pyright: ignore[reportAttributeAccessIssue]
    prompt = GenerateRequest(prompt="x")
    assert applied(preset, prompt).prompt == "x"  # pyright: ignore[reportAttributeAccessIssue]
    counted: Any = applied(preset, CountRequest(messages=chat().messages))
    assert counted.messages[0].role == "system"
    assert applied(Preset(), own) is own


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        (Preset(thinking="off"), Thinking(), Thinking(enabled=False)),
        (Preset(thinking="low"), Thinking(), Thinking(enabled=True, effort="low")),
        (Preset(thinking="off"), Thinking(effort="high"), Thinking(effort="high")),
        (Preset(thinking="off"), Thinking(budget=3), Thinking(enabled=False, budget=3)),
        (Preset(thinking_budget=7), Thinking(enabled=True), Thinking(enabled=True, budget=7)),
        (Preset(thinking_budget=7), Thinking(budget=1), Thinking(budget=1)),
    ],
)
def test_thinking_of_a_preset(preset: Preset, given: Thinking, expected: Thinking) -> None:
    """Issue 13, presets: a request switches it, or limits it."""
    request: Any = applied(preset, chat(thinking=given))
    assert request.thinking == expected


def test_a_table_with_a_base_is_a_name_of_that_model(tmp_path: Path) -> None:
    """Issue 13, presets: it has what it does not set from there; a change needs no new worker."""
    given = settings(tmp_path)
    assert list(given.config.models) == ["echo"]
    assert given.resolve("strict") == ("echo", "echo")
    spec = given.model_spec("strict")
    assert spec.name == "echo"
    assert spec.presets == {
        "strict": Preset(
            system="Be strict.",
            thinking="off",
            defaults={"max_tokens": 5, "temperature": 0, "stop": ["x"]},
        )
    }
    assert not needs_new_worker(spec, ModelSpec(name="echo", model="builtin:echo"))
    rows = {row.key: row.value for row in given.show()}
    assert (rows["models.strict.base"], rows["models.strict.system"]) == ("echo", "Be strict.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[models.a]\nbase = "b"\n', "no table of a model"),
        ('[models.a]\nbase = "a"\n', "no table of a model"),
        ('[models.e]\nmodel = "builtin:echo"\n[models.a]\nbase = "e"\nengine = "echo"\n', "only"),
        ('[models.e]\nmodel = "builtin:echo"\ndefaults = {temprature = 1}\n', "temprature"),
        ('[models.e]\nmodel = "builtin:echo"\ndefaults = {temperature = 9}\n', "between"),
        ('[models.e]\nmodel = "builtin:echo"\nthinking = "much"\n', "thinking"),
        ('[models.e]\nmodel = "builtin:echo"\nthinking_budget = -1\n', "thinking_budget"),
        ('[models.e]\nmodel = "builtin:echo"\ntool_format = "hermse"\n', "hermes"),
        (
            '[models.e]\nmodel = "builtin:echo"\naliases = ["a"]\n[models.a]\nbase = "e"\n',
            "a",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    """Issue 13, presets."""
    with pytest.raises(ConfigError, match=message) as refused:
        settings(tmp_path, text)
    assert "headrace.toml" in refused.value.message


async def test_two_names_share_one_process(tmp_path: Path) -> None:
    """Issue 13, presets: loaded once; each name has its defaults, and is listed."""
    given = settings(tmp_path)
    pool = runtime.open_pool(given, [given.model_spec("echo")])
    try:
        await pool.start()
        plain = await collect(pool.ask(chat(model="echo")))
        strict = await collect(pool.ask(chat(model="strict")))
        own = await collect(pool.ask(chat(model="strict", sampling=Sampling(max_tokens=3))))
        assert (plain.text, strict.text, own.text) == ("abcde", "abcde", "abc")
        assert strict.usage.prompt_tokens == plain.usage.prompt_tokens + len("Be strict.\x1e")
        count = await collect_count(
            pool.ask(CountRequest(model="strict", messages=chat().messages))
        )
        assert count.count == strict.usage.prompt_tokens
        infos = {info.id: info for info in pool.models()}
        assert infos.keys() == {"echo", "strict"}
        assert (infos["strict"].base, infos["echo"].base) == ("echo", None)
        assert infos["strict"].preset["system"] == "Be strict."
        assert len(pool.entries) == 1
    finally:
        await pool.aclose()


async def test_a_preset_that_a_request_contradicts(tmp_path: Path) -> None:
    """Issue 13, presets: the client gets the error, and the model lives."""
    text = '[models.e]\nmodel = "builtin:echo"\ndefaults = {min_tokens = 9}\n'
    given = settings(tmp_path, text)
    pool = runtime.open_pool(given, [given.model_spec("e")])
    try:
        await pool.start()
        with pytest.raises(InvalidRequest, match="min_tokens"):
            await collect(pool.ask(chat(model="e", sampling=Sampling(max_tokens=3))))
    finally:
        await pool.aclose()


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({"enable_thinking": False}, Thinking(), Thinking(enabled=False)),
        ({"thinking": True}, Thinking(budget=3), Thinking(enabled=True, budget=3)),
        ({"reasoning_effort": "low"}, Thinking(), Thinking(enabled=True, effort="low")),
        ({"reasoning_effort": "none"}, Thinking(), Thinking(enabled=False)),
        ({"reasoning_effort": "odd", "thinking": "x"}, Thinking(), Thinking(enabled=False)),
        ({"enable_thinking": False}, Thinking(effort="high"), Thinking(effort="high")),
    ],
)
def test_thinking_by_variables_of_a_template(
    options: dict[str, Any], given: Thinking, expected: Thinking
) -> None:
    """Issue 13: `chat_template_kwargs` are the policy too, before that of a preset."""
    request: Any = applied(Preset(thinking="off"), chat(thinking=given, template_options=options))
    assert request.thinking == expected
