"""The engine without Headrace, for tax.py: xllamacpp called in process, one thread a request.

Usage: `python tax_engine.py '{"model": FILE, "slots": ..., "threads": ..., ...}'`. It reads one
JSON command a line, `{"prompts": [...], "max_tokens": N}`, and answers with the seconds and tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from typing import Any

import xllamacpp

_FLASH = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}


class Request:
    """One request; the callback does as little as possible."""

    def __init__(self, prompt: str, max_tokens: int) -> None:
        self.chunks = 0
        self.last = b""
        self.first_at = 0.0
        # Only what the request needs: no token ids, no progress, no usage before the end.
        self._body = json.dumps(
            {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()

    def run(self, server: Any) -> None:
        """Block until it is answered."""
        server.handle_completions(self._body, self._on_chunk)

    def _on_chunk(self, raw: bytes) -> bool:
        if not self.chunks:
            self.first_at = time.monotonic()
        self.chunks += 1
        self.last = raw
        return False


def load(settings: dict[str, Any], directory: str) -> Any:
    """Load with the parameters that headrace.engines.llamacpp gives for the same options."""
    params: Any = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx = settings["context_length"] * settings["slots"]
    params.n_parallel = settings["slots"]
    params.kv_unified = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_batch = params.n_ubatch = settings["batch_size"]
    params.flash_attn_type = _FLASH[settings.get("flash_attention", "auto")]
    params.cache_type_k = params.cache_type_v = _KV_TYPES[settings.get("kv_type", "f16")]
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0
    params.load_mode = 1
    params.verbosity = 0
    # It always listens; here on a socket that is not used.
    params.hostnames = [f"{directory}/s.sock"]
    params.n_threads_http = 2
    return xllamacpp.Server(params)


def measure(server: Any, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    """Answer all prompts at once."""
    requests = [Request(prompt, max_tokens) for prompt in prompts]
    threads = [threading.Thread(target=request.run, args=(server,)) for request in requests]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    timings = [json.loads(request.last)["timings"] for request in requests]
    return {
        "seconds": seconds,
        "prompt_tokens": [timing["prompt_n"] + timing["cache_n"] for timing in timings],
        "cached_tokens": sum(timing["cache_n"] for timing in timings),
        "tokens": [timing["predicted_n"] for timing in timings],
        "prompt_ms": [timing["prompt_ms"] for timing in timings],
        "predicted_ms": [timing["predicted_ms"] for timing in timings],
    }


def main() -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory() as directory:
        server = load(json.loads(sys.argv[1]), directory)
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer = measure(server, command["prompts"], command["max_tokens"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
