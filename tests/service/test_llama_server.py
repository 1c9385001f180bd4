"""llama-server's routes on running models: the echo engine, and llama.cpp with tokens of gaps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.fakes import events
from tests.api.published import LLAMA_SERVER, hold
from tests.api.test_llama_server import VIM, WARM
from tests.models.builders import U32
from tests.service.serving import Service, served
from tests.tiny_gguf import tiny_gguf

CONFIGURATION = """
[models.echo]
model = "echo"
[models.coder]
model = {path}
engine = "llamacpp"
context_length = 512
[models.smollm2]
model = {smollm2}
context_length = 256
"""


@pytest.fixture(scope="module")
def service(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("llama_server")
    named: Any = {
        f"ggml__fim_{name}_token_id": (U32, token)
        for name, token in (("pre", 3), ("suf", 5), ("mid", 6))
    }
    path = tiny_gguf(folder / "fim.gguf", smollm2_path, **named)
    file = folder / "headrace.toml"
    values = {"path": json.dumps(str(path)), "smollm2": json.dumps(str(smollm2_path))}
    file.write_text(CONFIGURATION.format(**values))
    with served(environment={"CONFIG": str(file)}) as running:
        end = time.monotonic() + 120
        while {model["state"] for model in models(running)} != {"ready"}:
            assert time.monotonic() < end, running.log
            time.sleep(0.05)
        yield running


def models(service: Service) -> list[dict[str, Any]]:
    return httpx.get(f"{service.url}/v1/models", timeout=30).json()["data"]


def post(service: Service, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{service.url}{path}", json=body, timeout=60)


def test_a_completion_of_the_echo_engine(service: Service) -> None:
    """Issue 14.4: whole and streamed, each part by llama-server's schema."""
    body = {"model": "echo", "prompt": "one\ntwo", "n_predict": 5, "n_probs": 1}
    answer = post(service, "/completion", body).json()
    hold(LLAMA_SERVER, "completion", answer)
    assert (answer["content"], answer["stop_type"]) == ("one\nt", "limit")
    assert (answer["tokens_predicted"], answer["timings"]["predicted_n"]) == (5, 5)
    assert len(answer["completion_probabilities"]) == 5
    parts = events(post(service, "/completions", body | {"stream": True}).text)
    for part in parts:
        hold(LLAMA_SERVER, "event", part)
    assert "".join(part["content"] for part in parts) == answer["content"]
    assert [token for part in parts for token in part["tokens"]] == answer["tokens"]
    assert parts[-1]["timings"].keys() == answer["timings"].keys()


def test_lines_end_a_completion(service: Service) -> None:
    """Issue 14.4: by `n_indent`, also in a stream; the figures count what was computed."""
    text = "f:\n    a\n\n    b\nc\n    d"
    body = {"model": "echo", "prompt": text, "n_indent": 4}
    answer = post(service, "/completion", body).json()
    assert (answer["content"], answer["stop_type"]) == ("f:\n    a\n\n    b", "limit")
    parts = events(post(service, "/completion", body | {"stream": True}).text)
    assert "".join(part["content"] for part in parts) == answer["content"]


def test_an_editor_fills_a_gap(service: Service) -> None:
    """Issue 14.4: llama.vim's own requests, without a model's name, on llama.cpp.

    The vocabulary of SmolLM2 has tokens of files.
    """
    warm = post(service, "/infill", WARM)
    assert (warm.status_code, warm.json()) == (200, {})
    body = VIM | {"n_predict": 8}
    answer = post(service, "/infill", body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == set(VIM["response_fields"])
    whole = {name: value for name, value in body.items() if name != "response_fields"}
    answer = post(service, "/infill", whole).json()
    hold(LLAMA_SERVER, "completion", answer)
    assert answer["model"] == "coder"
    alone = post(service, "/infill", whole | {"input_extra": []}).json()
    assert alone["tokens_evaluated"] < answer["tokens_evaluated"]
    longest = whole | {"input_prefix": "x = 1\n" * 4000, "input_suffix": "y = 2\n" * 4000}
    cut = post(service, "/infill", longest).json()
    assert 400 < cut["tokens_evaluated"] <= 512 - 8
    assert cut["tokens_predicted"] >= 1
    refused = post(service, "/infill", VIM | {"model": "smollm2"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")


def test_a_template_and_its_prompt(service: Service) -> None:
    """Issue 14.4: what the template writes, sent as a prompt, has the same tokens as the chat."""
    messages = [{"role": "user", "content": "Hello"}]
    answer = post(service, "/apply-template", {"model": "smollm2", "messages": messages}).json()
    hold(LLAMA_SERVER, "apply-template", answer)
    assert answer["prompt"].endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    given = {"model": "smollm2", "prompt": answer["prompt"], "n_predict": 1}
    completion = post(service, "/completion", given).json()
    chat = {"model": "smollm2", "messages": messages, "max_tokens": 1}
    usage = post(service, "/v1/chat/completions", chat).json()["usage"]
    assert completion["tokens_evaluated"] == usage["prompt_tokens"]


def test_a_model_is_described(service: Service) -> None:
    props = httpx.get(f"{service.url}/props?model=coder").json()
    hold(LLAMA_SERVER, "props", props)
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert "/" not in props["model_path"]


def test_tokens_by_llama_servers_form(service: Service) -> None:
    """Issue 14.4: `content` without special tokens, and back."""
    tokens = post(service, "/tokenize", {"model": "smollm2", "content": "Hello world"}).json()
    hold(LLAMA_SERVER, "tokenize", tokens)
    given = {"model": "smollm2", "tokens": tokens["tokens"]}
    text = post(service, "/detokenize", given).json()
    hold(LLAMA_SERVER, "detokenize", text)
    assert text == {"content": "Hello world"}
