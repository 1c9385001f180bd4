"""The image that the Containerfile makes, as scripts/test-deploy has built it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

IMAGE = "localhost/headrace:test"
KEY = "key-of-the-test"
# As in compose.yaml and the chart, and without a network.
RESTRICTED = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--network", "none"),
    *("--security-opt", "no-new-privileges"),
    # Podman's own are more than a machine may allow that is a container itself.
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=512:512"),
)
ASK = """
import json, sys, urllib.error, urllib.request
url, key, body = "http://127.0.0.1:11511" + sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
data = json.dumps(body).encode() if body else None
try:
    answer = urllib.request.urlopen(urllib.request.Request(url, data, head), timeout=60)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, json.load(answer)]))
"""

pytestmark = pytest.mark.deploy


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    runtime = ("--runtime", "runc") if shutil.which("runc") else ()
    done = subprocess.run(
        ["podman", *runtime, *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0 or not check, f"{arguments}: {done.stderr}"
    return done


class Container:
    """A running container, and what it answers from the inside."""

    def __init__(self, *arguments: str) -> None:
        self.id = podman("run", "--detach", *RESTRICTED, *arguments).stdout.strip()

    def run(self, *command: str) -> str:
        return podman("exec", self.id, *command).stdout

    def ask(self, path: str, key: str, body: object = None) -> tuple[int, dict[str, object]]:
        return json.loads(self.run("python3", "-c", ASK, path, key, json.dumps(body)))

    def is_healthy(self) -> bool:
        return podman("healthcheck", "run", self.id, check=False).returncode == 0

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + 60
        while not self.is_healthy():
            assert time.monotonic() < end, podman("logs", self.id).stderr


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Container]:
    folder = tmp_path_factory.mktemp("image")
    file = folder / "headrace.toml"
    file.write_text('[models.small]\nmodel = "/models/small.gguf"\ncontext_length = 256\n')
    # What is pulled can be read by its user alone, who is none of the container.
    model = folder / "small.gguf"
    shutil.copyfile(smollm2_path, model)
    model.chmod(0o644)
    running = Container(
        *("--env", f"HEADRACE_API_KEYS={KEY}"),
        *("--volume", f"{file}:/etc/headrace/headrace.toml:ro"),
        *("--volume", f"{model}:/models/small.gguf:ro", IMAGE),
    )
    try:
        running.wait_until_healthy()
        yield running
    finally:
        podman("rm", "--force", "--time", "0", running.id)


def test_it_answers_a_chat_with_a_real_model(container: Container) -> None:
    """Issue 15.5: the image runs a model, with nothing to write to but its volume and /tmp."""
    chat = {"model": "small", "max_tokens": 8, "messages": [{"role": "user", "content": "Say hi"}]}
    status, answer = container.ask("/v1/chat/completions", KEY, chat)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] > 0  # type: ignore[index]
    assert container.ask("/v1/chat/completions", "another", chat)[0] == 401


def test_it_is_not_root(container: Container) -> None:
    """Issue 15.5: what runs has no user of the machine, and keeps its models in the volume."""
    assert container.run("id", "-u", "-n").strip() == "headrace"
    write = "! touch /opt/x 2>/dev/null && touch /var/lib/headrace/x && ls /var/lib/headrace"
    assert "measured.json" in container.run("sh", "-c", write)
    # Nothing can be compiled later, so that every process would do it again.
    compiled = "find /opt/headrace -name app.*.pyc | grep headrace/cli"
    assert container.run("sh", "-c", compiled).strip()


def test_messages_name_no_folder_of_the_build(container: Container) -> None:
    assert "/source" not in container.run("headrace", "doctor")


def test_without_a_key_it_refuses_to_start() -> None:
    """Issue 15.5: a container listens beyond loopback, so it does not start open by accident."""
    done = podman("run", "--rm", *RESTRICTED, IMAGE, "serve", "echo", check=False)
    assert done.returncode == 2
    assert "HEADRACE_API_KEYS" in done.stderr


def test_it_ends_as_it_should() -> None:
    """Issue 15.5: the stop signal ends it with 0, and long before it would be killed."""
    running = Container("--env", f"HEADRACE_API_KEYS={KEY}", IMAGE, "serve", "echo")
    try:
        running.wait_until_healthy()
        podman("stop", "--time", "60", running.id)
        state = json.loads(podman("inspect", running.id).stdout)[0]["State"]
        assert state["ExitCode"] == 0
        assert "Stopped" in podman("logs", running.id).stderr
    finally:
        podman("rm", "--force", "--time", "0", running.id)
