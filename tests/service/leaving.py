"""Requests to a service with one slot, whose client leaves before the end."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from tests.service.serving import Service


def body(words: int, **more: Any) -> dict[str, Any]:
    # A different beginning each time, so that no prefix is cached.
    text = f"{time.monotonic_ns()} " + "the river runs " * words
    return {"model": "smollm2", "prompt": text, "ignore_eos": True} | more


def wait_for_the_slot(service: Service) -> float:
    """Milliseconds that the next request waits for the only slot."""
    answer = httpx.post(f"{service.url}/v1/completions", json=body(1, max_tokens=1), timeout=60)
    return answer.json()["metrics"]["queue_ms"]


def leave(service: Service, stream: bool, words: int, after_s: float) -> None:
    """Ask for much, and hang up."""
    asked = body(words, max_tokens=600, stream=stream)
    with pytest.raises(httpx.ReadTimeout):
        if stream:
            with httpx.stream(
                "POST",
                f"{service.url}/v1/completions",
                json=asked,
                timeout=httpx.Timeout(10, read=after_s),
            ) as response:
                end = time.monotonic() + after_s
                for _ in response.iter_lines():
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout("enough")
        else:
            httpx.post(
                f"{service.url}/v1/completions",
                json=asked,
                timeout=httpx.Timeout(10, read=after_s),
            )
