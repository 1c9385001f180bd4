"""scripts/release, in a clone, and the installation of a plain checkout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tests.conftest import ROOT

TOOLS = ROOT / ".venv-deploy"

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=os.environ
        | {"DEPLOY_VENV": str(TOOLS), "PATH": f"{TOOLS}/bin:{os.environ['PATH']}"}
        | {f"GIT_{role}_{key}": "test@example.org" for role in ("AUTHOR", "COMMITTER")
           for key in ("NAME", "EMAIL")},
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of what is committed, with what is not committed of this checkout as a commit."""
    folder = tmp_path_factory.mktemp("release") / "clone"
    run("git", "clone", "--quiet", "--no-tags", ROOT, folder, cwd=ROOT)
    listed = run("git", "ls-files", "--modified", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.stdout.split():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "add", "--all", cwd=folder)
    run("git", "commit", "--quiet", "--allow-empty", "--message", "x", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def released(clone: Path) -> Path:
    """The folder of a release of 9.8.7."""
    assert "has no tag" in run("scripts/release", cwd=clone, check=False).stderr
    run("scripts/release", "cut", "9.8.7", cwd=clone)
    folder = clone.with_name("out")
    run("scripts/release", folder, cwd=clone)
    return folder


def test_a_version_is_cut(clone: Path, released: Path) -> None:
    """Issue 15.6: the version, the chart's, the tag and the changelog agree."""
    assert run("git", "describe", "--exact-match", cwd=clone).stdout.strip() == "v9.8.7"
    changelog = (clone / "CHANGELOG.md").read_text()
    assert "## Unreleased" not in changelog
    assert re.search(r"^## 9\.8\.7, \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    notes = (released / "NOTES.md").read_text()
    assert "### Added: clusters" in notes
    assert "## " not in re.sub("### ", "", notes)
    for name in ("helm/headrace/Chart.yaml", "kubernetes/headrace.yaml"):
        text = (clone / "deploy" / name).read_text()
        assert "9.8.7" in text
        assert "0.1.0" not in text
    assert "exists" in run("scripts/release", "cut", "9.8.7", cwd=clone, check=False).stderr
    assert "needs a version" in run("scripts/release", "cut", "9", cwd=clone, check=False).stderr


def test_two_builds_are_equal(clone: Path, released: Path, tmp_path: Path) -> None:
    """Issue 15.6: in another folder, with other modes of files and another umask, byte by byte."""
    names = ("headrace-9.8.7-py3-none-any.whl", "headrace-9.8.7.tar.gz")
    sums = (released / "SHA256SUMS").read_text()
    for name in names:
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() in sums
    other = tmp_path / "elsewhere"
    script = f"""
        umask 077
        git clone --quiet {clone} {other}
        cd {other}
        export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
        python -m build --no-isolation --outdir {tmp_path}/built . >/dev/null
        cd {tmp_path}/built
        sha256sum *
    """
    done = run("bash", "-euc", script, cwd=tmp_path)
    assert set(done.stdout.splitlines()) < set(sums.splitlines())


def test_what_is_in_a_release(clone: Path, released: Path) -> None:
    """Issue 15.6: an SBOM with versions and hashes of what is installed; where it comes from."""
    bill = json.loads((released / "headrace-9.8.7.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "headrace"
    parts = {part["name"]: part for part in bill["components"]}
    locked = (ROOT / "requirements" / "core.txt").read_text()
    for name in ("msgspec", "xllamacpp", "starlette"):
        assert f"{name}=={parts[name]['version']} " in locked
    provenance = (released / "PROVENANCE.md").read_text()
    assert run("git", "rev-parse", "HEAD", cwd=clone).stdout.strip() in provenance
    with tarfile.open(released / "headrace-9.8.7.tar.gz") as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Containerfile", "compose.yaml", "deploy/systemd/headrace.service"} <= files


def test_changes_that_are_not_committed_are_refused(clone: Path) -> None:
    (clone / "more.txt").write_text("x")
    try:
        assert "not committed" in run("scripts/release", cwd=clone, check=False).stderr
    finally:
        (clone / "more.txt").unlink()


def test_a_checkout_runs_without_an_installation(clone: Path) -> None:
    """Issue 15.6: `uvx --from . headrace`."""
    done = run(TOOLS / "bin" / "uvx", "--from", ".", "headrace", "--version", cwd=clone)
    assert re.fullmatch(r"headrace \d+\.\d+\.\d+\n", done.stdout)
