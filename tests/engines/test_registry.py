from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headrace import engines
from headrace.core.errors import ConfigError, LoadFailed, OutOfMemory
from headrace.core.install import install_command
from headrace.core.model import ModelFile
from headrace.engines import echo
from headrace.engines.base import About, OpenRequest
from headrace.engines.module import Module, default_footprint
from headrace.models.transfer import silent

GGUF = ModelFile(path="x.gguf", format="gguf")
NONE = ModelFile(path="", format="none")
UNKNOWN: Any = "floppy"
FLOPPY = ModelFile(path="x", format=UNKNOWN)


def test_the_engine_is_chosen_by_format_and_says_why() -> None:
    """W2: by format, when nobody names one."""
    name, reason = engines.choose(GGUF, device="cpu")
    assert name == "llamacpp"
    assert reason.startswith("gguf on cpu: llamacpp")
    assert engines.choose(NONE)[0] == "echo"


def test_a_named_engine_wins_and_must_suit_the_format() -> None:
    """W2: explicit name first; a format it cannot read is an error that lists who reads what."""
    assert engines.choose(GGUF, "llamacpp") == ("llamacpp", "asked for by name")
    with pytest.raises(ConfigError, match=r"reads none, not gguf.*llamacpp gguf"):
        engines.choose(GGUF, "echo")


def test_an_unknown_engine_or_format_lists_what_there_is() -> None:
    """W2: never a silent guess."""
    with pytest.raises(ConfigError, match=r"no engine 'lamacpp'; there are .*echo.*llamacpp"):
        engines.choose(GGUF, "lamacpp")
    with pytest.raises(ConfigError, match=r"format floppy.*llamacpp reads gguf"):
        engines.choose(FLOPPY)


def test_an_unknown_option_names_the_accepted_ones() -> None:
    """W3: an option is never dropped in silence."""
    with pytest.raises(ConfigError, match=r"'slotz' of engine echo.*slots.*text"):
        engines.check_options("echo", {"slotz": 1})
    with pytest.raises(ConfigError, match="'slots' of engine llamacpp"):
        engines.check_options("llamacpp", {"slots": 0})
    with pytest.raises(ConfigError, match="slotz"):
        engines.open_engine("echo", OpenRequest(model=NONE, options={"slotz": 1}))


def test_every_option_of_every_engine_describes_itself() -> None:
    """W3: name, type, default and help."""
    for name in engines.names():
        schema = engines.options(name).model_json_schema()
        assert schema["additionalProperties"] is False
        for option in schema["properties"].values():
            assert option["description"]
            assert "default" in option


def test_a_missing_library_is_a_hint_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """W2: what is not installed says how to install it, and is not chosen."""
    gone = About(formats=("gguf",), requires="no_such_library", extra="fast")
    for reader in ("llamacpp", "openvino"):
        monkeypatch.setattr(f"headrace.engines.{reader}.ABOUT", gone)
    hint = re.escape(install_command("fast"))
    assert not engines.status("llamacpp").available
    with pytest.raises(ConfigError, match=hint):
        engines.choose(GGUF, "llamacpp")
    with pytest.raises(ConfigError, match=hint):
        engines.choose(GGUF)

    class Unimportable:
        def __init__(self, request: OpenRequest) -> None:
            raise ImportError("no_such_library")

    monkeypatch.setattr("headrace.engines.llamacpp.engine.Engine", Unimportable)
    with pytest.raises(ConfigError, match=hint):
        engines.open_engine("llamacpp", OpenRequest(model=GGUF))


def test_a_library_that_is_too_old_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 17.7: its version is compared with what the extra asks for; a newer one is used."""
    needs = ["fastlib>=2.4; extra == 'fast'", "helper>=1; extra == 'fast'", "other>=9"]
    distribution(tmp_path, "headrace", "0.1", *needs)
    old = distribution(tmp_path, "fastlib", "2.3.9")
    distribution(tmp_path, "helper", "1.0")
    (tmp_path / "fastlib.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    about = About(formats=("gguf",), requires="fastlib", extra="fast")
    monkeypatch.setattr("headrace.engines.llamacpp.ABOUT", about)
    state = engines.status("llamacpp")
    assert not state.available
    assert state.reason.startswith("installed is fastlib 2.3.9, where >=2.4 is needed: ")
    assert state.reason.endswith(install_command("fast"))
    with pytest.raises(ConfigError, match=r"llamacpp: installed is fastlib 2\.3\.9"):
        engines.choose(GGUF, "llamacpp")
    with monkeypatch.context() as patch:
        patch.setattr(engines, "names", lambda: ("echo", "llamacpp"))
        with pytest.raises(ConfigError, match=r"fastlib 2\.3\.9"):
            engines.choose(GGUF)
    old.unlink()
    old.parent.rmdir()
    distribution(tmp_path, "fastlib", "2.10")
    assert engines.status("llamacpp").available
    assert engines.choose(GGUF, "llamacpp")[0] == "llamacpp"


def distribution(folder: Path, name: str, version: str, *needs: str) -> Path:
    """Write what an installer notes about a package; return its file."""
    path = folder / f"{name}-{version}.dist-info" / "METADATA"
    path.parent.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    path.write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]))
    return path


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(MemoryError(), OutOfMemory), (RuntimeError("native"), LoadFailed)],
)
def test_what_a_library_raises_while_loading_is_typed(
    raised: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W17: memory is told from everything else."""

    class Broken:
        def __init__(self, request: OpenRequest) -> None:
            raise raised

    monkeypatch.setattr(echo, "Engine", Broken)
    with pytest.raises(kind):
        engines.open_engine("echo", OpenRequest(model=NONE))


def test_another_package_brings_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W26: a distribution registers an engine by an entry point, and it is an engine like ours."""
    (tmp_path / "parrot_engine.py").write_text(
        "from headrace.engines.echo import Engine, Options\n"
        "from headrace.engines.base import About\n"
        "ABOUT = About(formats=('floppy',))\n"
    )
    info = tmp_path / "parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headrace.engines]\nparrot = parrot_engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "parrot" in engines.names()
    assert engines.choose(FLOPPY)[0] == "parrot"
    engine = engines.open_engine("parrot", OpenRequest(model=FLOPPY))
    assert engine.tokenize("a", add_special=False) == [97]


def test_naming_the_engines_imports_no_engine_library() -> None:
    """W1: what there is can be told without loading any of it."""
    program = (
        "import sys; from headrace import engines\n"
        "for name in engines.names(): engines.status(name), engines.options(name)\n"
        "assert not {'xllamacpp', 'llguidance', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_module_is_an_engine_by_three_names() -> None:
    """W26: ABOUT, Options and Engine are the whole contract."""
    for name in engines.names():
        module = sys.modules[f"headrace.engines.{name}"]
        assert isinstance(module, ModuleType)
        assert {"ABOUT", "Options"} <= vars(module).keys()
        # A package has it where its library may be imported.
        folder = Path(engines.__file__).parent / name
        assert hasattr(module, "Engine") is not (folder / "engine.py").exists()


def test_what_a_module_leaves_out_has_defaults() -> None:
    """W26: all that is asked of a module stands in module.Module."""
    module = ModuleType("bare")
    module.ABOUT, module.Options = echo.ABOUT, echo.Options  # pyright: ignore[reportAttributeAccessIssue]
    bare = Module.of(module)
    assert bare.prepared(GGUF, Path()) is GGUF
    assert bare.convert(GGUF, Path(), silent) is GGUF
    assert bare.tune_options(OpenRequest(model=GGUF)) == ()
    assert bare.footprint is default_footprint
