"""The program: its commands, its errors and its exit codes.

0 is success, 1 a failed engine or a lack of memory, 2 a wrong request, flag or configuration, and
130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from headrace.cli.common import Common, with_common
from headrace.core.errors import ConfigError, HeadraceError, RequestError

INTERRUPTED = 130
_LONGEST_DETAIL = 200
# The base of typer's usage errors has no public name.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def _version(wanted: bool) -> None:
    if wanted:
        from headrace import __version__

        print(f"headrace {__version__}")
        raise typer.Exit


def _start(
    common: Common,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Run language models behind one API, and measure what every request costs."""


# In the order of the help; a command has its place in this package, and two examples. That of
# `trace` has the commands of two files.
_GROUPS: dict[str, dict[str, tuple[str, str, str]]] = {
    "Ask": {
        "run": ("run.run", 'run smollm2 "Name three rivers."', "run smollm2"),
        "batch": (
            "batch.batch",
            "batch requests.jsonl -o answers.jsonl",
            "batch requests.jsonl -o answers.jsonl --model smollm2",
        ),
    },
    "Models": {
        "search": ("library.search", "search coder", "search vision 7b"),
        "library": ("library.library", "library --fits", "library --task embed"),
        "pull": ("store.pull", "pull smollm2", "pull hub:org/repo:Q4_K_M"),
        "ls": ("store.ls", "ls", "ls --json"),
        "show": ("store.show", "show smollm2", "show smollm2 --engine llamacpp"),
        "rm": ("store.rm", "rm smollm2", "rm --yes smollm2 all-minilm-l6-v2"),
        "import": ("import_.import_", "import Modelfile", "import ./Modelfile --as mario"),
        "plan": ("pool.plan", "plan smollm2", "plan ./models/large.gguf"),
    },
    "Service": {
        "serve": ("serve.serve", "serve smollm2", "serve ./a.gguf hub:org/repo:Q8_0 --port 8000"),
        "start": ("pool.start", "start smollm2", "start smollm2 --set keep_alive=5m"),
        "stop": ("pool.stop", "stop smollm2", "stop smollm2 --url http://gpu.example:11511"),
        "restart": ("pool.restart", "restart smollm2", "restart smollm2 --json"),
        "pin": ("pool.pin", "pin smollm2", "pin smollm2 --off"),
        "update": ("pool.update", "update smollm2 keep_alive=5m", "update smollm2 keep_alive="),
        "adapters": (
            "adapters.app",
            "adapters list qwen",
            "adapters add qwen french ./french.gguf",
        ),
        "cluster": ("cluster.app", "cluster node", "cluster front --nodes 10.0.0.2:11512"),
        "reload": ("pool.reload", "reload", "reload --url http://gpu.example:11511"),
        "service": ("installed.app", "service install", "service status"),
    },
    "Observe": {
        "ps": ("pool.ps", "ps", "ps --watch"),
        "top": ("top.top", "top", "top --interval 500ms"),
        "events": ("pool.events", "events", "events --json"),
        "usage": ("reports.usage", "usage --since 7d", "usage --by key,model"),
        "trace": ("replay.app", "trace ls", "trace show ID"),
    },
    "Measure": {
        "bench": (
            "bench.bench",
            "bench smollm2",
            "bench --url http://127.0.0.1:8000/v1 --model m --rate 2",
        ),
        "tune": ("tune.tune", "tune smollm2", "tune smollm2 --write latency"),
        "check-engine": (
            "check_engine.check_engine",
            "check-engine llamacpp --model smollm2",
            "check-engine my_package:Engine --model ./model.gguf",
        ),
    },
    "Set up": {
        "connect": (
            "connect.connect",
            "connect codex",
            'connect codex --run -- exec "Explain this folder."',
        ),
        "keys": ("keys.app", "keys create laptop --requests-per-day 1000", "keys list"),
        "config": ("reports.config", "config show", "config path"),
        "doctor": ("reports.doctor", "doctor", "doctor --json"),
    },
}


_COMMANDS = {name: row for rows in _GROUPS.values() for name, row in rows.items()}
_EXAMPLES = {
    "adapters": {
        "list": ("adapters list qwen", "adapters list qwen --json"),
        "add": (
            "adapters add qwen french ./french.gguf",
            "adapters add qwen legal hub:org/qwen-legal-lora --scale 0.8 --name lawyer",
        ),
        "remove": ("adapters remove qwen french", "adapters remove qwen french --json"),
    },
    "cluster": {
        "node": ("cluster node", "cluster node smollm2 --wire-host 0.0.0.0 --labels gpu"),
        "front": ("cluster front", "cluster front --nodes 10.0.0.2:11512,10.0.0.3:11512"),
        "up": ("cluster up headrace.toml", "cluster up /etc/headrace.toml --wait-s 60"),
        "down": ("cluster down", "cluster down --json"),
        "status": ("cluster status", "cluster status --json"),
        "drain": ("cluster drain node-1", "cluster drain node-1 --off"),
    },
    "service": {
        "install": ("service install smollm2", "service install --config headrace.toml"),
        "uninstall": ("service uninstall", "service uninstall --json"),
        "status": ("service status", "service status --json"),
    },
    "trace": {
        "ls": ("trace ls --since 1h", "trace ls --status error --json"),
        "show": ("trace show ID", "trace show ID --json"),
        "tree": ("trace tree ID", "trace tree -v ID"),
        "stats": ("trace stats --since 1h", "trace stats --model smollm2"),
        "replay": ("trace replay ID", "trace replay ID --model other"),
    },
    "keys": {
        "list": ("keys list", "keys list --all --json"),
        "create": (
            "keys create laptop --requests-per-minute 60 --tokens-per-day 200000",
            "keys create me --scope admin",
        ),
        "limit": ("keys limit laptop --concurrent 2", "keys limit laptop --models smollm2"),
        "revoke": ("keys revoke laptop", "keys revoke 0123456789abcdef"),
    },
    "config": {
        "show": ("config show", "config show hub:org/repo"),
        "path": ("config path", "config path --json"),
    },
}


class _Grouped(TyperGroup):
    """The help with commands in groups, each with its whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        groups = {"Commands": self.commands} if ctx.parent else _GROUPS
        for title, names in groups.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, (self.commands[name].help or "").partition("\n")[0]) for name in names]
                )


def _examples(lines: Iterable[str]) -> str:
    # The control character keeps the lines apart.
    return "\b\nExamples:\n" + "\n".join(f"  headrace {line}" for line in lines)


def application(*names: str) -> typer.Typer:
    """Return the program with these commands, without names with all: each takes its imports."""
    app = typer.Typer(
        name="headrace",
        cls=_Grouped,
        help="Run language models behind one API, and measure what every request costs.",
        epilog=_examples(('run smollm2 "Name three rivers."', "serve smollm2")),
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(with_common(_start))
    for name in names or _COMMANDS:
        place, *lines = _COMMANDS[name]
        module, _, attribute = place.partition(".")
        command = getattr(importlib.import_module(f"headrace.cli.{module}"), attribute)
        if name not in _EXAMPLES:
            app.command(name, epilog=_examples(lines))(with_common(command))
            continue
        for info in command.registered_commands:
            info.epilog = _examples(_EXAMPLES[name][info.name or ""])
        app.add_typer(command, name=name, cls=_Grouped, epilog=_examples(lines))
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    flags = _before(arguments, "--")
    try:
        app = application(*(name for name in arguments[:1] if name in _COMMANDS))
        code = app(args=list(arguments) or ["--help"], prog_name="headrace", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except _UsageError as error:
        return _fail(flags, error, "UsageError", cast("Any", error).format_message(), 2)
    except HeadraceError as error:
        code = 2 if isinstance(error, RequestError | ConfigError) else 1
        return _fail(flags, error, type(error).__name__, _message(error, flags), code, error.param)
    except OSError as error:
        _drop_output()
        return _fail(flags, error, type(error).__name__, _system_message(error), 1)
    except Exception as error:  # noqa: BLE001 - the last place where it can be reported
        message = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        return _fail(flags, error, "InternalError", message, 1)
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """Drop what stdout cannot take, so that no flush fails again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
