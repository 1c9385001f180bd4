"""`headrace service`: run `headrace serve` by the supervisor of this user's session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer
from typer import Option

from headrace.cli import terminal, unit
from headrace.cli.common import Common, with_common
from headrace.cli.serve import Models, wanted
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.config import Settings

app = typer.Typer(help="Run as a service of this user: systemd, launchd.", no_args_is_help=True)

_TIMEOUT_S = 90


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor reports: `state` is `active`, `failed`, ... or `not installed`.

    It is `unknown` where the systemd of this user cannot be reached.
    """

    file: str
    state: str
    enabled: bool = False
    pid: int | None = None
    text: str = ""


class _Supervisor(NamedTuple):
    """A supervisor of user's services: its program, and the file that it reads."""

    program: str
    file: Path

    def call(self, *arguments: str, check: bool = True) -> str:
        """Run the program and return its output.

        Raises:
            ConfigError: it is not there, or it fails and `check` is set.
        """
        path = shutil.which(self.program)
        if path is None:
            raise ConfigError(f"{self.program} was not found: no service can be set up here.")
        done = subprocess.run(  # noqa: S603 - a fixed program, and no shell
            [path, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if check and done.returncode:
            error = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise ConfigError(f"{self.program} {' '.join(arguments)}: {error}")
        return done.stdout

    @property
    def is_launchd(self) -> bool:
        """Whether this is macOS'."""
        return self.program == "launchctl"


def install(
    common: Common,
    models: Models = None,
    *,
    start: Annotated[bool, Option(help="Start it now, and at each login.")] = True,
) -> None:
    """Install `headrace serve` as a service of this user, and start it.

    Settings come from the configuration file that is read here; variables of this shell are not
    passed on. Once installed, `headrace service install` writes the unit again and restarts it.
    """
    settings = common.settings()
    wanted(settings, models or [])
    supervisor = _supervisor(os.environ)
    _refuse_foreign(supervisor.file)
    supervisor.call("help" if supervisor.is_launchd else "--version")
    if start:
        _demand_reached(supervisor, "; --no-start writes the unit alone")
    supervisor.file.parent.mkdir(parents=True, exist_ok=True)
    supervisor.file.write_bytes(_content(supervisor, settings, common, models or []))
    if start:
        _start(supervisor)
    elif not supervisor.is_launchd and _is_reached(supervisor):
        supervisor.call("--user", "daemon-reload")
    for note in _notes(supervisor):
        terminal.note(note)
    _show(common, supervisor)


def uninstall(common: Common) -> None:
    """Stop the service of this user and remove it; models and settings stay."""
    supervisor = _supervisor(os.environ)
    if supervisor.file.exists():
        _refuse_foreign(supervisor.file)
        _demand_reached(supervisor)
        if supervisor.is_launchd:
            supervisor.call("bootout", f"{_domain()}/{unit.NAME}", check=False)
            supervisor.file.unlink()
        else:
            supervisor.call("--user", "disable", "--now", supervisor.file.name)
            supervisor.file.unlink()
            supervisor.call("--user", "daemon-reload")
    _show(common, supervisor)


def status(common: Common) -> None:
    """Show whether the service of this user is installed and runs."""
    _show(common, _supervisor(os.environ))


for _command in (install, uninstall, status):
    app.command(_command.__name__)(with_common(_command))


def _supervisor(environ: Mapping[str, str]) -> _Supervisor:
    home = Path(environ.get("HOME") or Path.home())
    if sys.platform == "darwin":
        return _Supervisor("launchctl", home / "Library/LaunchAgents" / f"{unit.NAME}.plist")
    folder = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    return _Supervisor("systemctl", folder / "systemd/user" / f"{unit.NAME}.service")


def _is_reached(supervisor: _Supervisor) -> bool:
    """Whether it answers: in a container, or after `su`, a user may have no systemd."""
    return supervisor.is_launchd or bool(
        supervisor.call("--user", "show", "--property=Version", check=False)
    )


def _demand_reached(supervisor: _Supervisor, otherwise: str = "") -> None:
    if not _is_reached(supervisor):
        raise ConfigError(
            "The systemd of this user is not reached: log in as this user instead of with su or "
            "sudo, or run `loginctl enable-linger` and set "
            f"XDG_RUNTIME_DIR=/run/user/{os.getuid()}{otherwise}."
        )


def _refuse_foreign(file: Path) -> None:
    """Keep a file that another program or the user has written."""
    if file.exists() and unit.MARK.encode() not in file.read_bytes():
        raise ConfigError(f"{file} was not written by `headrace service install`; remove it first.")


def _content(
    supervisor: _Supervisor, settings: Settings, common: Common, models: Sequence[str]
) -> bytes:
    script = Path(sys.executable).with_name("headrace")
    program = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "headrace"]
    command, environ = [*program, "serve", *map(_absolute, models)], dict[str, str]()
    if settings.file is not None:
        environ["HEADRACE_CONFIG"] = str(settings.file.resolve())
    if settings.origin("home") != "default" and not settings.origin("home").startswith("file"):
        environ["HEADRACE_HOME"] = str(settings.config.home)
    drain_s = settings.config.server.drain_s
    if not supervisor.is_launchd:
        return unit.systemd_unit(command, environ, drain_s).encode()
    log = supervisor.file.parents[1] / "Logs" / f"{unit.NAME}.log"
    return unit.launchd_agent(command, environ, drain_s, log)


def _absolute(model: str) -> str:
    """Return a path as a service finds it, which runs in another folder; names stay."""
    return str(Path(model).resolve()) if os.sep in model and Path(model).exists() else model


def _start(supervisor: _Supervisor) -> None:
    if supervisor.is_launchd:
        supervisor.call("bootout", f"{_domain()}/{unit.NAME}", check=False)
        supervisor.call("bootstrap", _domain(), str(supervisor.file))
        return
    supervisor.call("--user", "daemon-reload")
    supervisor.call("--user", "enable", supervisor.file.name)
    supervisor.call("--user", "restart", supervisor.file.name)


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _notes(supervisor: _Supervisor) -> Iterator[str]:
    """Yield what a user may not expect."""
    kept = {"HEADRACE_CONFIG", "HEADRACE_HOME", "HEADRACE_URL"}
    names = sorted(name for name in os.environ if name.startswith("HEADRACE_") and name not in kept)
    if names:
        yield f"not passed to the service, as set in this shell only: {', '.join(names)}"
    if not supervisor.is_launchd:
        yield "it runs while you are logged in; `loginctl enable-linger` keeps it running"


def _show(common: Common, supervisor: _Supervisor) -> None:
    state = _status(supervisor)
    pid = f", process {state.pid}" if state.pid else ""
    lines = [f"{unit.NAME}: {state.state}{pid}{f' ({state.text})' if state.text else ''}"]
    common.show(state, [*lines, f"file     {state.file}"])


def _status(supervisor: _Supervisor) -> ServiceStatus:
    file = str(supervisor.file)
    if not supervisor.file.exists():
        return ServiceStatus(file=file, state="not installed")
    if supervisor.is_launchd:
        output = supervisor.call("print", f"{_domain()}/{unit.NAME}", check=False)
        facts = _pairs(output, " = ")
        return ServiceStatus(
            file=file,
            state=facts.get("state", "not loaded"),
            enabled=bool(facts),
            pid=int(facts.get("pid", 0)) or None,
        )
    if not _is_reached(supervisor):
        text = "the systemd of this user is not reached"
        return ServiceStatus(file=file, state="unknown", text=text)
    wanted = "--property=ActiveState,UnitFileState,MainPID,StatusText"
    facts = _pairs(supervisor.call("--user", "show", supervisor.file.name, wanted), "=")
    return ServiceStatus(
        file=file,
        state=facts.get("ActiveState", "unknown"),
        enabled=facts.get("UnitFileState") == "enabled",
        pid=int(facts.get("MainPID", 0)) or None,
        text=facts.get("StatusText", ""),
    )


def _pairs(output: str, separator: str) -> dict[str, str]:
    """Read lines of a name and a value; the first of a name counts."""
    pairs: dict[str, str] = {}
    for line in output.splitlines():
        name, separated, value = line.strip().partition(separator)
        if separated:
            pairs.setdefault(name, value)
    return pairs
