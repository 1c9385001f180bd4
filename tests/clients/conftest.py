"""One service for the clients of others: the echo engine, which calls at will, and a real model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.programs import record
from tests.service.serving import served

MODELS = """\
[models.smollm2]
model = "smollm2"
context_length = 2048

[models.echo]
model = "builtin:echo"
options = {forms = true}
"""


@pytest.fixture(scope="session")
def url(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("clients") / "headrace.toml"
    config.write_text(MODELS)
    with served("--config", str(config)) as service:
        yield f"{service.url}/v1"


# The package of a test, by the beginning of its name, and what it tries, by the rest.
PACKAGES = {
    "langchain": "langchain-openai",
    "pydantic_ai": "pydantic-ai-slim",
    "instructor": "instructor",
    "the_agents_sdk": "openai-agents",
    "litellm": "litellm",
}
TRIED = {"calls_tools": "tools", "structured|output|instructor": "structured output"}


def package_of(test: str) -> str | None:
    """Return the package of a test; LangChain has one for each API."""
    for beginning, package in PACKAGES.items():
        if test.startswith(f"test_{beginning}"):
            apis = re.search(r"\[.*?(anthropic|ollama)", test) if beginning == "langchain" else None
            return f"langchain-{apis[1]}" if apis else package
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what was tried, in docs/clients.json."""
    file, _, test = report.nodeid.rpartition("::")
    package = package_of(test)
    if report.when != "call" or package is None or not file.startswith("tests/clients/"):
        return
    for pattern, tried in TRIED.items():
        if re.search(pattern, test.partition("[")[0]):
            record.note(package, version(package), tried, works=report.passed)
