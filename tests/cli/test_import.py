"""Issue 13: `headrace import` writes a model into the configuration."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from tests.cli.programs import headrace


def test_a_modelfile_becomes_a_model(environ: dict[str, str], tmp_path: Path) -> None:
    """Issue 13: what was there stays, what is left out is printed, and the model answers."""
    file = tmp_path / "headrace.toml"
    file.write_text("# mine\n[models.other]\nmodel = 'echo'\n")
    # As an editor of Windows saves it.
    (tmp_path / "Modelfile").write_bytes(
        'FROM echo\nPARAMETER num_ctx 64\nPARAMETER stop "###"\nTEMPLATE """{{ .Prompt }}"""\n'
        "PARAMETER mirostat 1\n".encode("utf-16")
    )
    given = ("import", str(tmp_path / "Modelfile"), "--config", str(file))
    done = headrace(environ, *given, "--as", "mine")
    assert done.returncode == 0, done.stderr
    assert "Left out: TEMPLATE: it is a Go template" in done.stdout
    assert "Left out: PARAMETER mirostat" in done.stdout
    assert "+[models.mine]" in done.stderr
    text = file.read_text()
    assert text.startswith("# mine\n[models.other]\nmodel = 'echo'\n")
    mine = tomllib.loads(text)["models"]["mine"]
    assert (mine["model"], mine["context_length"]) == ("builtin:echo", 64)
    done = headrace(environ, "show", "mine", "--config", str(file), "--json")
    assert json.loads(done.stdout)["context_length"] == 64, done.stderr
    done = headrace(environ, *given, "--as", "mine")
    assert (done.returncode, file.read_text()) == (2, text)
    assert "has a model mine already" in done.stderr


def test_show_prints_a_preset(environ: dict[str, str], tmp_path: Path) -> None:
    """Issue 13, presets: of a table of its own, and of a further name of a loaded model."""
    file = tmp_path / "headrace.toml"
    tables = (
        '[models.one]\nmodel = "echo"\nsystem = "A."',
        '[models.two]\nbase = "one"\nthinking = "off"',
    )
    file.write_text("\n".join(tables))
    for name, base, preset in (
        ("one", None, {"system": "A."}),
        ("two", "one", {"system": "A.", "thinking": "off"}),
    ):
        done = headrace(environ, "show", name, "--config", str(file), "--json")
        shown = json.loads(done.stdout)
        assert (shown["id"], shown["base"], shown["preset"]) == (name, base, preset)
