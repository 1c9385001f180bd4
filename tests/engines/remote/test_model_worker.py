from __future__ import annotations

from pathlib import Path

import pytest
from tests.fakes.upstream import upstream_aside

from headrace import ModelWorker
from headrace.core.events import Delta

MESSAGES = [{"role": "user", "content": "Hello?"}]


def test_the_blocking_worker_has_remote_models_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W1, W9, W10: by its reference and options, like any other."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with upstream_aside() as far:
        url, key = f"{far.url}/v1", "sk-of-the-caller"
        with ModelWorker("openai:gpt-x", base_url=url, api_key=key) as worker:
            assert worker.generate(messages=MESSAGES).text == "Hello there"
            parts = worker.generate_stream(messages=MESSAGES, max_tokens=5)
            text = "".join(one.text for one in parts if isinstance(one, Delta))
            assert text == "Hello there"
            assert "sk-of" not in repr(worker)
        sent = [seen.headers["authorization"] for seen in far.requests]
    assert sent == ["Bearer sk-of-the-caller"] * 2
