"""The program: its commands, its errors and its exit codes.

0 is success, 1 a failed engine or a lack of memory, 2 a wrong request, flag or configuration, and
130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from headrace.cli import (
    adapters,
    batch,
    bench,
    check_engine,
    cluster,
    connect,
    import_,
    installed,
    keys,
    library,
    pool,
    replay,
    reports,
    serve,
    store,
    top,
    trace,
    tune,
)
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


# In the order of the help; a command has the name of its function, and two examples.
_GROUPS: dict[str, dict[Callable[..., None] | str, tuple[str, str]]] = {
    "Ask": {
        run_command.run: ('run smollm2 "Name three rivers."', "run smollm2"),
        batch.batch: (
            "batch requests.jsonl -o answers.jsonl",
            "batch requests.jsonl -o answers.jsonl --model smollm2",
        ),
    },
    "Models": {
        library.search: ("search coder", "search vision 7b"),
        library.library: ("library --fits", "library --task embed"),
        store.pull: ("pull smollm2", "pull hub:org/repo:Q4_K_M"),
        store.ls: ("ls", "ls --json"),
        store.show: ("show smollm2", "show smollm2 --engine llamacpp"),
        store.rm: ("rm smollm2", "rm --yes smollm2 all-minilm-l6-v2"),
        import_.import_: ("import Modelfile", "import ./Modelfile --as mario"),
        pool.plan: ("plan smollm2", "plan ./models/large.gguf"),
    },
    "Service": {
        serve.serve: ("serve smollm2", "serve ./a.gguf hub:org/repo:Q8_0 --port 8000"),
        pool.start: ("start smollm2", "start smollm2 --set keep_alive=5m"),
        pool.stop: ("stop smollm2", "stop smollm2 --url http://gpu.example:11511"),
        pool.restart: ("restart smollm2", "restart smollm2 --json"),
        pool.pin: ("pin smollm2", "pin smollm2 --off"),
        pool.update: ("update smollm2 keep_alive=5m", "update smollm2 keep_alive="),
        "adapters": ("adapters list qwen", "adapters add qwen french ./french.gguf"),
        "cluster": ("cluster node", "cluster front --nodes 10.0.0.2:11512"),
        pool.reload: ("reload", "reload --url http://gpu.example:11511"),
        "service": ("service install", "service status"),
    },
    "Observe": {
        pool.ps: ("ps", "ps --watch"),
        top.top: ("top", "top --interval 500ms"),
        pool.events: ("events", "events --json"),
        reports.usage: ("usage --since 7d", "usage --by key,model"),
        "trace": ("trace ls", "trace show ID"),
    },
    "Measure": {
        bench.bench: ("bench smollm2", "bench --url http://127.0.0.1:8000/v1 --model m --rate 2"),
        tune.tune: ("tune smollm2", "tune smollm2 --write latency"),
        check_engine.check_engine: (
            "check-engine llamacpp --model smollm2",
            "check-engine my_package:Engine --model ./model.gguf",
        ),
    },
    "Set up": {
        connect.connect: ("connect codex", 'connect codex --run -- exec "Explain this folder."'),
        "keys": ("keys create laptop --requests-per-day 1000", "keys list"),
        "config": ("config show", "config path"),
        reports.doctor: ("doctor", "doctor --json"),
    },
}


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
        for title, commands in groups.items():
            names = [name if isinstance(name, str) else _name(name) for name in commands]
            with formatter.section(title):
                formatter.write_dl(
                    [(name, (self.commands[name].help or "").partition("\n")[0]) for name in names]
                )


def _name(command: Callable[..., None]) -> str:
    return command.__name__.rstrip("_").replace("_", "-")


def _examples(lines: Iterable[str]) -> str:
    # The control character keeps the lines apart.
    return "\b\nExamples:\n" + "\n".join(f"  headrace {line}" for line in lines)


for _commands in _GROUPS.values():
    for _command, _lines in _commands.items():
        if not isinstance(_command, str):
            app.command(_name(_command), epilog=_examples(_lines))(with_common(_command))
app.info.cls = _Grouped
app.info.epilog = _examples(('run smollm2 "Name three rivers."', "serve smollm2"))
trace.app.command("replay")(with_common(replay.replay))
for _title, _group, _part in (
    ("Service", "adapters", adapters.app),
    ("Service", "cluster", cluster.app),
    ("Service", "service", installed.app),
    ("Set up", "config", reports.config),
    ("Set up", "keys", keys.app),
    ("Observe", "trace", trace.app),
):
    for _info in _part.registered_commands:
        _info.epilog = _examples(_EXAMPLES[_group][_info.name or ""])
    app.add_typer(_part, name=_group, cls=_Grouped, epilog=_examples(_GROUPS[_title][_group]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    flags = _before(arguments, "--")
    try:
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
