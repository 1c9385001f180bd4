"""What lm-eval's client for completions sends to score continuations, and how it reads answers."""

from __future__ import annotations

from typing import Any

import httpx

Score = tuple[float, bool]


async def loglikelihoods(
    http: httpx.AsyncClient, model: str, pairs: list[tuple[list[int], list[int]]]
) -> list[Score]:
    """Return the sum of log probabilities of each continuation, and whether it is greedy."""
    body = {
        "model": model,
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    return [
        _score(choice["logprobs"], len(context))
        for choice, (context, _) in zip(choices, pairs, strict=True)
    ]


def _score(logprobs: dict[str, Any], length: int) -> Score:
    # The last one is the token that had to be made.
    values = logprobs["token_logprobs"][length:-1]
    tops = logprobs["top_logprobs"][length:-1]
    greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), greedy
