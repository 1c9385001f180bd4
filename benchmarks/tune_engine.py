"""OpenVINO without Headrace, for tune_peer.py: its pipeline, stepped in process.

Usage: `python tune_engine.py '{"model": FOLDER, "slots": ..., "threads": ..., ...}'`. It reads one
JSON command a line, `{"prompts": [...], "max_tokens": N}`, and answers with the seconds and tokens.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import openvino_genai as genai

_BLOCK = 32


def load(settings: dict[str, Any], tokenizer: genai.Tokenizer) -> genai.ContinuousBatchingPipeline:
    """Load with what headrace.engines.openvino gives for the same options."""
    scheduler = genai.SchedulerConfig()
    tokens = settings["context_length"] * settings["slots"]
    scheduler.num_kv_blocks = -(-tokens // _BLOCK) + 1
    scheduler.max_num_seqs = settings["slots"]
    scheduler.max_num_batched_tokens = max(settings["batch_size"], settings["slots"])
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings["threads"]}
    if settings.get("precision", "auto") != "auto":
        properties["INFERENCE_PRECISION_HINT"] = settings["precision"]
    if settings.get("kv_type", "auto") != "auto":
        properties["KV_CACHE_PRECISION"] = settings["kv_type"]
    return genai.ContinuousBatchingPipeline(
        settings["model"], tokenizer, scheduler, "CPU", **properties
    )


def measure(
    pipeline: genai.ContinuousBatchingPipeline,
    tokenizer: genai.Tokenizer,
    prompts: list[str],
    max_tokens: int,
) -> dict[str, Any]:
    """Answer all prompts at once; from the texts to the texts."""
    config = genai.GenerationConfig()
    config.apply_chat_template = False
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    began = time.monotonic()
    inputs = [tokenizer.encode(prompt, add_special_tokens=True).input_ids for prompt in prompts]
    handles = [pipeline.add_request(at, ids, config) for at, ids in enumerate(inputs)]
    made: list[list[int]] = [[] for _ in prompts]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for handle, tokens in zip(handles, made, strict=True):
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
    for tokens in made:
        tokenizer.decode(tokens, skip_special_tokens=True)
    return {
        "seconds": time.monotonic() - began,
        "prompt_tokens": [ids.get_size() for ids in inputs],
        "tokens": [len(tokens) for tokens in made],
    }


def main() -> None:
    """Serve until standard input ends."""
    settings = json.loads(sys.argv[1])
    tokenizer = genai.Tokenizer(settings["model"])
    pipeline = load(settings, tokenizer)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = measure(pipeline, tokenizer, command["prompts"], command["max_tokens"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
