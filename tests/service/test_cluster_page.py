"""docs/cluster.md, walked as it is written: each block runs, on one machine and with `echo`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.conftest import ROOT
from tests.ports import free_port
from tests.service.serving import Service, served
from tests.service.test_cluster import until

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|toml)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HOSTS = ("10.0.0.2", "10.0.0.3")


class Walk:
    """Machines are processes: the one with the address 10.0.0.N is node-N."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {host: free_port() for host in HOSTS}
        self.running: dict[str, tuple[Service, ExitStack]] = {}
        self.ran = 0

    def start(self, words: list[str]) -> None:
        role = words[1] if words[1] == "serve" else words[2]
        name, more = role, [*words[2:]] if role == "serve" else [*words[3:]]
        if role == "node":
            host = more[more.index("--wire-host") + 1]
            name = f"node-{host[-1]}"
            more[more.index(host)] = "127.0.0.1"
            more += ["--wire-port", str(self.ports[host]), "--node-name", name]
        self.stop(name)
        held = ExitStack()
        command = ("serve",) if role == "serve" else ("cluster", role)
        environment = {"HOME": str(self.folder / name), "CONFIG": str(self.file)}
        started = served(*more, environment=environment, command=command, ready=role != "front")
        self.running[name] = held.enter_context(started), held

    def stop(self, name: str) -> None:
        if name in self.running:
            self.running.pop(name)[1].close()

    @property
    def file(self) -> Path:
        return self.folder / "headrace.toml"

    def write(self, text: str) -> None:
        for host, port in self.ports.items():
            text = text.replace(f"{host}:11512", f"127.0.0.1:{port}")
        self.file.write_text(text.replace('model = "smollm2"', 'model = "echo"'))

    def restart(self) -> None:
        """Let all that runs of a cluster read a new file."""
        for host in HOSTS:
            self.start(["headrace", "cluster", "node", "--wire-host", host])
        self.start(["headrace", "cluster", "front"])
        self.wait(2)

    def wait(self, nodes: int) -> None:
        url = self.running["front"][0].url

        def loaded() -> bool:
            found = httpx.get(f"{url}/admin/models").json()["nodes"]
            return len([node for node in found if "small" in node["models"]]) == nodes

        until(loaded)

    def run(self, block: str) -> None:
        front = self.running.get("front") or self.running.get("serve")
        url = front[0].url if front else ""
        script = block.replace("http://127.0.0.1:11511", url)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script.replace("curl ", "curl -sS --fail ")],
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=100,
            check=False,
            env=os.environ
            | {"HEADRACE_URL": url, "HEADRACE_CONFIG": str(self.file)}
            | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page(tmp_path: Path) -> None:
    """Issue 15, shown 6: a laptop's file grown to a cluster, each block run."""
    walk = Walk(tmp_path)
    try:
        for kind, block in BLOCKS:
            if kind == "toml":
                walk.write(block)
                if "front" in walk.running:
                    walk.restart()
                continue
            lines = block.splitlines()
            services = [line for line in lines if re.match(r"headrace (serve|cluster (n|f))", line)]
            if not services:
                walk.run(block)
            for line in services:
                walk.start(shlex.split(line))
            if "front" in walk.running and services:
                walk.wait(2)
            if "serve" in walk.running:
                walk.stop("serve")
            walk.ran += 1
        assert walk.ran >= 8
    finally:
        for name in [*walk.running]:
            walk.stop(name)
