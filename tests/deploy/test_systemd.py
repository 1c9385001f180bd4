"""The units of deploy/systemd, and the unit that `headrace service install` writes."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from headrace.cli import unit
from headrace.cli.app import run as cli

FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
EXPOSURE = 1.5
"""What `systemd-analyze security` gives each unit at most, of 10; docs/systemd.md states it."""

analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces of its own")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_the_units_differ_only_in_what_they_run() -> None:
    """Issue 15.5: all are hardened, watched, and get the time that answers may take."""
    own = re.compile(r"#|Description=|ExecStart=|LoadCredential=|Environment=HEADRACE_TOKEN_FILE=")
    texts = [
        [line for line in file.read_text().splitlines() if not own.match(line)] for file in UNITS
    ]
    assert len(texts) == 3
    assert texts[0] == texts[1] == texts[2]
    assert {"Type=notify", "WatchdogSec=30", "OOMPolicy=continue"} <= set(texts[0])


@analyze
@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_systemd_accepts_a_unit(file: Path, tmp_path: Path) -> None:
    """Issue 15, shown 5: verified, and its exposure to attacks rated."""
    copy = tmp_path / file.name
    copy.write_text(file.read_text().replace("/opt/headrace/bin/headrace", "/bin/true"))
    shutil.copy(FOLDER / "headrace.socket", tmp_path)
    assert run("systemd-analyze", "verify", copy).strip() == ""
    limit = f"--threshold={EXPOSURE * 10:.0f}"
    output = run("systemd-analyze", "security", "--offline=yes", limit, copy)
    assert "Overall exposure level" in output
    assert f"{EXPOSURE} of 10" in (ROOT / "docs" / "systemd.md").read_text()


@analyze
def test_the_unit_of_a_user(tmp_path: Path) -> None:
    """Issue 15.5: words with a meaning in units are quoted."""
    folder = tmp_path / "a $b %c d"
    folder.mkdir()
    program = folder / "headrace"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    words = [str(program), "serve", "x;y", "$HOME", "back\\slash", '"']
    file = tmp_path / "headrace.service"
    file.write_text(unit.systemd_unit(words, {"HEADRACE_CONFIG": "/a b/50%.toml"}, 30.0))
    assert run("systemd-analyze", "verify", file).strip() == ""
    assert 'Environment="HEADRACE_CONFIG=/a b/50%%.toml"' in file.read_text()
    assert "TimeoutStopSec=45" in file.read_text()


def test_the_agent_of_a_user() -> None:
    """Issue 15.5: launchd's property list is readable, and starts it again after a crash."""
    words = ["/opt/headrace", "serve"]
    agent = plistlib.loads(unit.launchd_agent(words, {"A": "b"}, 30.0, Path("/log")))
    assert agent["ProgramArguments"] == words
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] == 45


@pytest.mark.skipif(sys.platform == "darwin", reason="launchd is always there")
def test_a_user_without_a_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 15.5: as in a container, or after su: it says so, and leaves nothing half done."""
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\n[ $1 = --version ] || { echo No medium found >&2; exit 1; }\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    file = tmp_path / ".config/systemd/user/headrace.service"

    assert cli(["service", "install", "echo"]) == 2
    assert "enable-linger" in capsys.readouterr().err
    assert not file.exists()

    assert cli(["service", "install", "echo", "--no-start"]) == 0
    assert "unknown (the systemd of this user is not reached)" in capsys.readouterr().out
    assert file.read_text().startswith(f"# {unit.MARK}")

    assert cli(["service", "uninstall"]) == 2
    assert "enable-linger" in capsys.readouterr().err
    assert file.exists(), "it may run"


@pytest.mark.deploy
@is_root
@pytest.mark.timeout(180)
def test_a_service_of_a_user(tmp_path: Path) -> None:
    """Issue 15.5: installed, started, killed, started again, removed, by a systemd that runs."""
    output = in_systemd(tmp_path, "install.sh")
    assert re.findall(r"^headrace: (\w+)", output, re.MULTILINE)[-1] == "not"
    assert output.count("headrace: active") == 2
    assert "(Ready)" in output
    assert "started again" in output


@pytest.mark.deploy
@is_root
@pytest.mark.timeout(180)
def test_a_hardened_service_answers(tmp_path: Path, smollm2_path: Path) -> None:
    """Issue 15.5: what the units take from a service, it does not need for a real model."""
    text = (FOLDER / "headrace.service").read_text()
    command = f"{ROOT}/.venv/bin/headrace serve {smollm2_path.resolve()}"
    text = text.replace("/opt/headrace/bin/headrace serve", f"{command} --context-length 256")
    # The environment of the tests may be in a home, a user's systemd changes no users, and a
    # namespace that is a container's has parts of /proc that cannot be mounted again.
    for name in ("ProtectHome", "DynamicUser", "ProtectKernelTunables", "ProtectKernelLogs"):
        text = text.replace(f"{name}=yes\n", "")
    text = text.replace("WorkingDirectory=/etc/headrace", "WorkingDirectory=%C")
    (tmp_path / "headrace.service").write_text(text)
    answer = in_systemd(tmp_path, "hardened.sh")
    assert '"completion_tokens"' in answer
    assert "Seccomp:\t2" in answer


def in_systemd(folder: Path, script: str) -> str:
    """Run a script beside a systemd of its own, in namespaces of its own."""
    place = ROOT / "tests" / "deploy"
    unshare = ("unshare", "--mount", "--cgroup", "--pid", "--fork", "--kill-child", "--mount-proc")
    environ = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        environ.pop(name, None)
    done = subprocess.run(
        [*unshare, "bash", place / "in-systemd.sh", place / script],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=folder,
        env=environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
