"""Starts the program as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-c", "from headrace.cli import main; main()")


def headrace(
    environ: dict[str, str], *arguments: str, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=environ,
        input=stdin,
        cwd=cwd or environ["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def serving(environ: dict[str, str], *arguments: str) -> Iterator[tuple[Any, str]]:
    command = [*PROGRAM, "serve", "--json", "--port", "0", *arguments]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def ask(url: str, body: dict[str, Any], key: str = "") -> Any:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    return urllib.request.urlopen(request, timeout=20)


HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
