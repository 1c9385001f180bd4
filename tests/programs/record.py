"""What ran: a client, its version, and what was tried with it, kept in docs/clients.json."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conftest import ROOT

from headrace.cli.clients import CLIENTS

FILE = ROOT / "docs" / "clients.json"


def read() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


_tried: dict[tuple[str, str], bool] = {}
"""What this process has tried: several tests of one kind have all to pass."""


def note(client: str, version: str, tried: str, *, works: bool) -> None:
    """Add to the record of a client; another version begins a new one."""
    _tried[client, tried] = works and _tried.get((client, tried), True)
    entries = read()
    entry = entries.get(client, {})
    before = entry.get("works", {}) if entry.get("version") == version else {}
    entries[client] = {"version": version, "works": {**before, tried: _tried[client, tried]}}
    text = json.dumps(dict(sorted(entries.items())), indent=2) + "\n"
    FILE.write_text(text, encoding="utf-8")


# How a client is set up without `headrace connect`, and the API that it uses.
PACKAGES = {
    "openai-node": ("OpenAI's package for Node", "chat, responses", '`baseURL: ".../v1"`'),
    "openai-agents": ("OpenAI's Agents SDK", "responses, chat", "an `AsyncOpenAI` with `base_url`"),
    "langchain-openai": ("`langchain-openai`", "chat", "`headrace connect langchain`"),
    "langchain-anthropic": ("`langchain-anthropic`", "messages", "`base_url`, without `/v1`"),
    "langchain-ollama": ("`langchain-ollama`", "Ollama's", "`base_url`, without `/v1`"),
    "litellm": ("LiteLLM", "chat, responses, messages, Ollama's", "`headrace connect litellm`"),
    "pydantic-ai-slim": ("Pydantic AI", "chat", "an `OpenAIProvider` with `base_url`"),
    "instructor": ("instructor", "chat", "an `OpenAI` with `base_url`"),
}
# What the usual tests use, in the versions of requirements/dev.txt.
LOCKED = {
    "openai": ("OpenAI's package", "all of OpenAI's", '`base_url=".../v1"`'),
    "anthropic": ("Anthropic's package", "messages", "`ANTHROPIC_BASE_URL`, without `/v1`"),
    "ollama": ("Ollama's package", "Ollama's", "`OLLAMA_HOST`"),
}
NOT_RUN = {
    "home-assistant": "not run: a whole system; the `ollama` package that it uses is below",
    "vscode": "not run: an editor, in no package index; the Copilot CLI is above",
    "langchain": "as below",
}
# The proxy is a client of `headrace connect`, the package another.
_NOTED = {"litellm": "litellm-proxy"}
_APIS = {
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/chat/completions": "chat",
    "/api/chat": "Ollama's",
}


def table() -> str:
    """Return the table of docs/clients.md: what ran, and the set-up."""
    entries = read()
    rows: list[tuple[str, ...]] = [("client", "version", "works", "API", "set up by")]
    rows.append(("---",) * 5)
    for name, entry in CLIENTS.items():
        ran = entries.get(_NOTED.get(name, name), {}) if name not in NOT_RUN else {}
        works = _works(ran) or NOT_RUN.get(name, "not run")
        how = f"`headrace connect {name}`: {entry.how}"
        rows.append((entry.title, ran.get("version", "-"), works, _APIS[entry.api], how))
    lock = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    for name, (title, api, how) in LOCKED.items():
        version = re.search(rf"^{name}==(\S+)", lock, re.MULTILINE)
        rows.append((title, version[1] if version else "-", "all that is served", api, how))
    for name, (title, api, how) in PACKAGES.items():
        ran = entries.get(name, {})
        rows.append((title, ran.get("version", "-"), _works(ran) or "not run", api, how))
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"


def _works(ran: dict[str, Any]) -> str:
    """Return what works, and what does not."""
    tried: dict[str, bool] = ran.get("works", {})
    good = [name for name, works in tried.items() if works]
    bad = [f"**not {name}**" for name, works in tried.items() if not works]
    return ", ".join([*good, *bad])
