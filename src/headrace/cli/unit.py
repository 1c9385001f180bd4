"""The files that make a service of `headrace serve`: a unit for systemd, an agent for launchd.

The units for a whole machine are in the folder deploy/systemd of the repository.
"""

from __future__ import annotations

import plistlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

NAME = "headrace"
MARK = "Written by `headrace service install`"

_KILLED_AFTER_S = 15
"""From the end of `drain_s` until the process is killed."""

_UNIT = """\
# {mark}, which writes it again.
[Unit]
Description=Headrace, language models behind one API

[Service]
Type=notify
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
{environment}Restart=on-failure
RestartSec=2
WatchdogSec=30
TimeoutStopSec={stop_s}
OOMPolicy=continue
KillMode=mixed
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""


def systemd_unit(command: Sequence[str], environ: Mapping[str, str], drain_s: float) -> str:
    """Return the unit of a user, which runs `command`."""
    program, *arguments = command
    pairs = (f"{name}={value}" for name, value in environ.items())
    return _UNIT.format(
        mark=MARK,
        # In arguments, $ would begin the name of a variable.
        command=_words([program, *(word.replace("$", "$$") for word in arguments)]),
        environment="".join(f"Environment={_words([pair])}\n" for pair in pairs),
        stop_s=round(drain_s) + _KILLED_AFTER_S,
    )


def _words(words: Iterable[str]) -> str:
    """Quote words for a line of a unit."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    word = word.replace("%", "%%")
    if word and not set(word) & set(" \t\n\"'\\;"):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def launchd_agent(
    command: Sequence[str], environ: Mapping[str, str], drain_s: float, log: Path
) -> bytes:
    """Return the property list of a user's agent, which runs `command` and logs to a file."""
    return plistlib.dumps(
        {
            "Label": NAME,
            "ProgramArguments": [*command],
            "EnvironmentVariables": dict(environ),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ExitTimeOut": round(drain_s) + _KILLED_AFTER_S,
            "ProcessType": "Interactive",
            "StandardErrorPath": str(log),
            "Comment": f"{MARK}, which writes it again.",
        }
    )
