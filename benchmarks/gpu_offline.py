"""The rate of an engine by itself: one call with all requests, in this process.

It reads `{"engine", "model", "options", "rounds"}`, where a round is a list of requests of token
ids and max tokens, and writes one line for each round.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Requests = list[tuple[list[int], int]]
Run = Callable[[Requests], int]
"""Answers all requests and returns the number of tokens."""


def vllm(job: dict[str, Any]) -> Run:
    """Return `LLM.generate`."""
    from vllm import LLM, SamplingParams

    engine = LLM(job["model"], load_format="dummy", **job["options"])

    def run(requests: Requests) -> int:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=most) for _, most in requests
        ]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def transformers(job: dict[str, Any]) -> Run:
    """Return `generate_batch`, which has one length for all answers."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
    )
    model = model.to(device).eval()
    longest = max(most for requests in job["rounds"] for _, most in requests)
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Newer versions can keep what the first call sets up.
    known = inspect.signature(model.generate_batch).parameters
    kept = {"persistent_manager": True} if "persistent_manager" in known else {}

    def run(requests: Requests) -> int:
        outputs = model.generate_batch(
            inputs=[ids for ids, _ in requests],
            generation_config=config,
            progress_bar=False,
            **kept,
        )
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


def main() -> None:
    """Run the job that is read from standard input."""
    job = json.loads(sys.stdin.readline())
    began = time.monotonic()
    run = {"vllm": vllm, "transformers": transformers}[job["engine"]](job)
    print(json.dumps({"start": time.monotonic() - began}), flush=True)
    for requests in job["rounds"]:
        began = time.monotonic()
        tokens = run(requests)
        print(json.dumps({"seconds": time.monotonic() - began, "tokens": tokens}), flush=True)
    if job["engine"] == "transformers":
        # The thread of a persistent manager would keep the process alive.
        os._exit(0)


if __name__ == "__main__":
    main()
