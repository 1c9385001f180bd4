"""The program: its commands, its errors and its exit codes.

0 is success, 1 a failed engine or a lack of memory, 2 a wrong request, flag or configuration, and
130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from headrace.cli import bench, check_engine, pool, replay, reports, serve, store, top, trace, tune
from headrace.cli import run as run_command
from headrace.cli.common import Common, with_common
from headrace.core.errors import ConfigError, HeadraceError, RequestError

INTERRUPTED = 130
_LONGEST_DETAIL = 200
# The base of typer's usage errors has no public name.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])

app = typer.Typer(
    name="headrace",
    help="Run language models behind one API, and measure what every request costs.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from headrace import __version__

        print(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
@with_common
def start(
    common: Common,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Run language models behind one API, and measure what every request costs."""


# In the order of the help; a command has the name of its function.
for _command in (
    *(run_command.run, serve.serve, store.pull, store.ls, store.show, tune.tune, bench.bench),
    *(store.rm, pool.ps, top.top, reports.usage, pool.start, pool.stop, pool.restart, pool.pin),
    *(pool.update, pool.plan, pool.events, pool.reload, reports.doctor),
    check_engine.check_engine,
):
    app.command()(with_common(_command))
app.add_typer(reports.config, name="config")
app.add_typer(trace.app, name="trace")
trace.app.command("replay")(with_common(replay.replay))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    flags = _before(arguments, "--")
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="headrace", standalone_mode=False)
    except BrokenPipeError:
        # The reader of the pipe has closed it; flushing the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except _UsageError as error:
        return _fail(flags, error, "UsageError", cast("Any", error).format_message(), 2)
    except HeadraceError as error:
        code = 2 if isinstance(error, RequestError | ConfigError) else 1
        return _fail(flags, error, type(error).__name__, _message(error, flags), code, error.param)
    except OSError as error:
        return _fail(flags, error, type(error).__name__, _system_message(error), 1)
    except Exception as error:  # noqa: BLE001 - the last place where it can be reported
        message = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        return _fail(flags, error, "InternalError", message, 1)
    return code if isinstance(code, int) else 0


def _before(arguments: Sequence[str], end: str) -> Sequence[str]:
    return arguments[: arguments.index(end)] if end in arguments else arguments


def _message(error: HeadraceError, flags: Sequence[str]) -> str:
    # The user of a command line may see the details that a service only logs.
    detail = error.detail or ""
    if len(detail) > _LONGEST_DETAIL and not {"-v", "--verbose", "--debug"} & set(flags):
        return f"{error.message} (-v shows more)"
    return f"{error.message} ({detail})" if detail else error.message


def _system_message(error: OSError) -> str:
    """Return what the system refused, and where."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {reason}."
    try:
        Path.cwd()
    except OSError:
        return "The current folder has been removed; change to another."
    return f"The system reports: {reason}."


def _fail(
    flags: Sequence[str],
    error: BaseException,
    kind: str,
    message: str,
    code: int,
    param: str | None = None,
) -> int:
    if "--debug" in flags or os.environ.get("HEADRACE_DEBUG"):
        traceback.print_exception(error)
    if "--json" in flags:
        body = {"type": kind, "message": message, "param": param}
        print(json.dumps({"error": body}), file=sys.stderr)
    else:
        # A file may have several faults.
        lines = message.splitlines() if isinstance(error, ConfigError) else [message]
        for line in lines:
            print("error:", " ".join(line.split()), file=sys.stderr)
    return code
