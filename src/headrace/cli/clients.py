"""The programs of others that a service can be connected to: one row for each.

A row says what the program needs and returns its set-up: files, variables and the command. A key is
named by its variable in all of them, and never written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cli.client import Card
from headrace.cli.setups import (
    KEY,
    MARK,
    File,
    Setup,
    Target,
    as_json,
    as_lines,
    as_toml,
    as_yaml,
    yaml_lines,
)

_CLAUDE_SIZES = ("OPUS", "SONNET", "HAIKU")

Build = Callable[[Target, Path], Setup]
"""Returns the set-up for a target; the folder is where the client looks for files."""


@dataclass(frozen=True)
class Connection:
    """A client: its name, API, how it is set up, and what it needs of a model.

    `prompt` is about how many tokens its first prompt has before the user's. `run` is the set-up
    with files in a folder of Headrace's own; None if the client cannot be started so.
    """

    title: str
    api: str
    how: str
    build: Build
    run: Build | None = None
    tools: bool = False
    prompt: int = 0


def _codex_provider(target: Target) -> dict[str, Any]:
    provider = {"name": "Headrace", "base_url": target.v1, "wire_api": "responses"}
    return provider | ({"env_key": KEY} if target.needs_key else {})


def _codex_settings(target: Target) -> dict[str, Any]:
    size = target.main.context_length
    window = {"model_context_window": size} if size else {}
    return {"model": target.main.id, "model_provider": "headrace", **window}


def _codex(target: Target, home: Path) -> Setup:
    lines = [f"# {MARK}", *as_toml(_codex_settings(target)), ""]
    lines += ["[model_providers.headrace]", *as_toml(_codex_provider(target))]
    folder = Path(os.environ.get("CODEX_HOME") or home / ".codex")
    return Setup(
        [File(folder / "headrace.config.toml", as_lines(lines))],
        {},
        ("codex", "--profile", "headrace"),
    )


def _codex_run(target: Target, folder: Path) -> Setup:
    del folder
    table = "{" + ", ".join(as_toml(_codex_provider(target))) + "}"
    settings = [*as_toml(_codex_settings(target)), f"model_providers.headrace={table}"]
    flags = [part for setting in settings for part in ("-c", setting)]
    return Setup((), {}, ("codex", *flags))


def _claude_env(target: Target) -> dict[str, str]:
    names = ["ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{n}_MODEL" for n in _CLAUDE_SIZES)]
    env = {"ANTHROPIC_BASE_URL": target.url, **dict.fromkeys(names, target.main.id)}
    if size := target.main.context_length:
        env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(size)
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(max(1, min(32_000, size // 4)))
    return env


def _claude(target: Target, home: Path) -> Setup:
    env = _claude_env(target)
    settings: dict[str, Any] = {"env": env, "apiKeyHelper": f'printf %s "${KEY}"'}
    if not target.needs_key:
        settings = {"env": {**env, "ANTHROPIC_AUTH_TOKEN": target.secret}}
    path = home / ".claude" / "headrace.json"
    return Setup([File(path, as_json(settings))], {}, ("claude", "--settings", str(path)))


def _claude_run(target: Target, folder: Path) -> Setup:
    del folder
    return Setup((), {**_claude_env(target), "ANTHROPIC_AUTH_TOKEN": target.secret}, ("claude",))


def _copilot(target: Target, home: Path) -> Setup:
    del home
    env = {
        "COPILOT_PROVIDER_BASE_URL": target.v1,
        "COPILOT_PROVIDER_API_KEY": target.secret,
        # In chats it sends parameters of its own, over those of the model.
        "COPILOT_PROVIDER_WIRE_API": "responses",
        "COPILOT_MODEL": target.main.id,
        "COPILOT_OFFLINE": "true",
    }
    if size := target.main.context_length:
        output = max(1, size // 4)
        env["COPILOT_PROVIDER_MAX_PROMPT_TOKENS"] = str(max(1, size - output))
        env["COPILOT_PROVIDER_MAX_OUTPUT_TOKENS"] = str(output)
    return Setup((), env, ("copilot",))


def _opencode_config(target: Target) -> dict[str, Any]:
    def described(card: Card) -> dict[str, Any]:
        about: dict[str, Any] = {"name": card.id, "tool_call": card.calls_tools}
        if size := card.context_length:
            about["limit"] = {"context": size, "output": max(1, size // 4)}
        return about

    options = {"baseURL": target.v1, "apiKey": target.secret_as("{{env:{}}}")}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Headrace",
        "options": options,
        "models": {card.id: described(card) for card in target.models},
    }
    return {"$schema": "https://opencode.ai/config.json", "provider": {"headrace": provider}}


def _opencode(target: Target, home: Path) -> Setup:
    path = _config(home) / "opencode" / "opencode.json"
    file = File(path, as_json(_opencode_config(target)), "json")
    return Setup([file], {}, ("opencode", "--model", f"headrace/{target.main.id}"))


def _opencode_run(target: Target, folder: Path) -> Setup:
    del folder
    name = f"headrace/{target.main.id}"
    config = {**_opencode_config(target), "model": name, "small_model": name}
    return Setup((), {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}, ("opencode",))


def _qwen_settings(target: Target) -> dict[str, Any]:
    def described(card: Card) -> dict[str, Any]:
        about: dict[str, Any] = {"id": card.id, "name": card.id, "baseUrl": target.v1}
        about["envKey"] = KEY
        if card.context_length:
            about["generationConfig"] = {"contextWindowSize": card.context_length}
        return about

    return {"modelProviders": {"openai": [described(card) for card in target.models]}}


def _qwen_command(target: Target) -> Sequence[str]:
    return ("qwen", "--auth-type", "openai", "--model", target.main.id)


def _qwen(target: Target, home: Path) -> Setup:
    file = File(home / ".qwen" / "settings.json", as_json(_qwen_settings(target)), "json")
    env = {} if target.needs_key else {KEY: "none"}
    return Setup([file], env, _qwen_command(target))


def _qwen_run(target: Target, folder: Path) -> Setup:
    file = File(folder / "qwen-code.json", as_json(_qwen_settings(target)))
    env = {KEY: target.secret, "QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(file.path)}
    return Setup([file], env, _qwen_command(target))


def _continue_in(target: Target, path: Path) -> Setup:
    def described(card: Card) -> dict[str, Any]:
        about: dict[str, Any] = {"name": card.id, "provider": "openai", "model": card.id}
        about |= {"apiBase": target.v1, "apiKey": target.secret_as("${{{{ secrets.{} }}}}")}
        about["roles"] = ["chat", "edit", "apply"]
        abilities = {"tool_use": card.calls_tools, "image_input": "vision" in card.capabilities}
        about["capabilities"] = [name for name, has in abilities.items() if has]
        if card.context_length:
            about["defaultCompletionOptions"] = {"contextLength": card.context_length}
        return about

    head = {"name": "Headrace", "version": "1.0.0", "schema": "v1"}
    config = {**head, "models": [described(card) for card in target.models]}
    return Setup([File(path, as_yaml(config))], {}, ("cn", "--config", str(path)))


def _continue(target: Target, home: Path) -> Setup:
    made = _continue_in(target, home / ".continue" / "headrace.yaml")
    secret = f"# Continue reads {KEY} from ~/.continue/.env"
    extension = "# In an editor: copy the models into ~/.continue/config.yaml"
    steps = (*([secret] if target.needs_key else []), extension)
    return Setup(made.files, made.env, made.command, steps)


def _continue_run(target: Target, folder: Path) -> Setup:
    return _continue_in(target, folder / "continue.yaml")


def _aider_in(target: Target, config: Path, about: Path) -> Setup:
    name = f"openai/{target.main.id}"
    settings: dict[str, Any] = {"model": name, "openai-api-base": target.v1}
    files: list[File] = []
    if size := target.main.context_length:
        facts = {"max_input_tokens": size, "max_output_tokens": max(1, size // 4)}
        costs = {"input_cost_per_token": 0, "output_cost_per_token": 0}
        facts |= {"litellm_provider": "openai", "mode": "chat", **costs}
        files.append(File(about, as_json({name: facts})))
        settings["model-metadata-file"] = str(about)
    settings |= {"check-update": False, "show-model-warnings": False}
    if not target.needs_key:
        settings["openai-api-key"] = target.secret
    files.insert(0, File(config, as_yaml(settings)))
    env = {"OPENAI_API_KEY": target.secret} if target.needs_key else {}
    return Setup(files, env, ("aider", "--config", str(config)))


def _aider(target: Target, home: Path) -> Setup:
    return _aider_in(target, home / ".aider.headrace.yml", home / ".aider.headrace.json")


def _aider_run(target: Target, folder: Path) -> Setup:
    return _aider_in(target, folder / "aider.yml", folder / "aider.json")


def _open_webui(target: Target, home: Path) -> Setup:
    del home
    env = {"OPENAI_API_BASE_URL": target.v1, "OPENAI_API_KEY": target.secret}
    step = "# Read at the first start; later: Admin Panel > Settings > Connections"
    env["ENABLE_OLLAMA_API"] = "false"
    return Setup((), env, ("open-webui", "serve"), (step,))


def _home_assistant(target: Target, home: Path) -> Setup:
    del home
    steps = (
        "Settings > Devices & services > Add integration > Ollama",
        f"URL: {target.url} (Home Assistant has to reach this address)",
        f"Model: {target.main.id}",
        *(["API key: that of the service"] if target.needs_key else []),
    )
    return Setup(steps=steps)


def _llm(target: Target, home: Path) -> Setup:
    folder = Path(os.environ.get("LLM_USER_PATH") or _support(home) / "io.datasette.llm")
    models = [
        {
            "model_id": f"headrace/{card.id}",
            "model_name": card.id,
            "api_base": target.v1,
            **({"api_key_name": "headrace"} if target.needs_key else {}),
            "supports_tools": card.calls_tools,
        }
        for card in target.models
    ]
    file = File(folder / "extra-openai-models.yaml", as_lines(yaml_lines(models)), "block")
    steps = [f'llm keys set headrace --value "${KEY}"'] if target.needs_key else []
    return Setup([file], {}, ("llm", "--model", f"headrace/{target.main.id}"), steps)


def _langchain(target: Target, home: Path) -> Setup:
    del home
    key = f'os.environ["{KEY}"]' if target.needs_key else '"none"'
    name = json.dumps(target.main.id, ensure_ascii=False)
    lines = (
        "from langchain_openai import ChatOpenAI",
        f'model = ChatOpenAI(model={name}, base_url="{target.v1}", api_key={key})',
    )
    return Setup(steps=(("import os", *lines) if target.needs_key else lines))


def _litellm_in(target: Target, path: Path) -> Setup:
    def described(card: Card) -> dict[str, Any]:
        key = target.secret_as("os.environ/{}")
        about = {"model": f"openai/{card.id}", "api_base": target.v1, "api_key": key}
        facts = {"max_input_tokens": card.context_length} if card.context_length else {}
        return {"model_name": card.id, "litellm_params": about, "model_info": facts}

    config = {"model_list": [described(card) for card in target.models]}
    return Setup([File(path, as_yaml(config))], {}, ("litellm", "--config", str(path)))


def _litellm(target: Target, home: Path) -> Setup:
    return _litellm_in(target, _config(home) / "litellm" / "headrace.yaml")


def _litellm_run(target: Target, folder: Path) -> Setup:
    return _litellm_in(target, folder / "litellm.yaml")


def _vscode(target: Target, home: Path) -> Setup:
    def described(card: Card) -> dict[str, Any]:
        output = max(1, (card.context_length or 32_768) // 4)
        return {
            "id": card.id,
            "name": card.id,
            "url": f"{target.v1}/chat/completions",
            "toolCalling": card.calls_tools,
            "vision": "vision" in card.capabilities,
            "maxInputTokens": (card.context_length or 32_768) - output,
            "maxOutputTokens": output,
        }

    provider = {"name": "Headrace", "vendor": "customendpoint", "apiType": "chat-completions"}
    models = [described(card) for card in target.models]
    key = {} if target.needs_key else {"apiKey": "none"}
    path = _support(home) / "Code" / "User" / "chatLanguageModels.json"
    steps = ["Chat: Manage Language Models > Headrace > Update API key"] if target.needs_key else []
    return Setup([File(path, as_json([provider | key | {"models": models}]), "json")], steps=steps)


def _config(home: Path) -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")


def _support(home: Path) -> Path:
    """Return the folder of programs that follow the system they run on."""
    if sys.platform == "darwin":
        return home / "Library" / "Application Support"
    return _config(home)


CLIENTS: dict[str, Connection] = {
    "codex": Connection(
        *("Codex CLI", "/v1/responses", "a profile of its own (from 0.134)"),
        *(_codex, _codex_run, True, 6_100),
    ),
    "claude-code": Connection(
        *("Claude Code", "/v1/messages", "a file of settings of its own"),
        *(_claude, _claude_run, True, 12_400),
    ),
    "copilot": Connection(
        *("GitHub Copilot CLI", "/v1/responses", "variables"),
        *(_copilot, _copilot, True, 11_000),
    ),
    "opencode": Connection(
        *("opencode", "/v1/chat/completions", "a provider in its configuration"),
        *(_opencode, _opencode_run, True, 7_600),
    ),
    "qwen-code": Connection(
        *("Qwen Code", "/v1/chat/completions", "a provider in its settings"),
        *(_qwen, _qwen_run, True, 12_300),
    ),
    "continue": Connection(
        *("Continue", "/v1/chat/completions", "a configuration of its own"),
        *(_continue, _continue_run, True, 1_400),
    ),
    "aider": Connection(
        *("aider", "/v1/chat/completions", "a configuration of its own"),
        *(_aider, _aider_run, False, 700),
    ),
    "open-webui": Connection(
        *("Open WebUI", "/v1/chat/completions", "variables of its server"),
        *(_open_webui, _open_webui),
    ),
    "home-assistant": Connection(
        *("Home Assistant", "/api/chat", "in its pages"), _home_assistant, tools=True
    ),
    "llm": Connection("llm", "/v1/chat/completions", "models in a file of its own", _llm),
    "langchain": Connection("LangChain", "/v1/chat/completions", "in the program", _langchain),
    "litellm": Connection(
        *("LiteLLM's proxy", "/v1/chat/completions", "a configuration of its own"),
        *(_litellm, _litellm_run),
    ),
    "vscode": Connection(
        *("VS Code", "/v1/chat/completions", "a custom endpoint in its models (from 1.122)"),
        _vscode,
        tools=True,
    ),
}
