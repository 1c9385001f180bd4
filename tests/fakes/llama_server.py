"""A llama-server of xllamacpp: the executable's arguments and HTTP side, without building it.

`install` writes a script that runs this file, for tests that need an executable.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEVICES_VARIABLE = "FAKE_LLAMA_DEVICES"
VERSION = "version: 4242 (abc1234)\nbuilt with GNU 12.2.0 for Linux x86_64"
_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_ROPE = {"none": 0, "linear": 1, "yarn": 2}
_DRAFTS = {"draft-simple": 1, "ngram-simple": 6}
_POOLING = {"mean": 1, "cls": 2, "last": 3}


def install(folder: Path, name: str = "llama-server") -> Path:
    """Write the executable into a folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model", "alias", "host", "flash-attn", "cache-type-k", "cache-type-v", "device"):
        parser.add_argument(f"--{name}")
    for name in ("ctx-size", "parallel", "threads", "threads-batch", "threads-http"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("batch-size", "ubatch-size", "n-gpu-layers", "cache-ram", "verbosity"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("rope-scaling", "chat-template", "pooling", "load-mode", "mmproj", "fit"):
        parser.add_argument(f"--{name}")
    for name in ("spec-type", "spec-draft-model", "spec-draft-type-k", "spec-draft-type-v"):
        parser.add_argument(f"--{name}")
    for name in ("draft-n-max", "ngram-simple-size-m", "ngram-simple-size-n"):
        parser.add_argument(f"--spec-{name}", type=int)
    parser.add_argument("--rope-scale", type=float)
    parser.add_argument("--embd-normalize", type=int)
    for name in ("embedding", "kv-unified", "no-cache-prompt", "no-slots", "no-ui"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("no-mmproj-offload", "offline"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def _serve(given: argparse.Namespace) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames = given.model, [given.host]
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_ctx, params.n_parallel = given.ctx_size, given.parallel
    params.n_threads_http = given.threads_http
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.n_batch, params.n_ubatch = given.batch_size, given.ubatch_size
    params.kv_unified, params.embedding = given.kv_unified, given.embedding
    params.flash_attn_type = _FLASH[given.flash_attn]
    params.cache_type_k = params.cache_type_v = _TYPES[given.cache_type_k]
    params.cache_ram_mib, params.verbosity = given.cache_ram, given.verbosity
    params.chat_template, params.fit_params = given.chat_template, False
    params.cache_prompt = not given.no_cache_prompt
    if given.embedding:
        params.embd_normalize = given.embd_normalize
    if given.pooling:
        params.pooling_type = type(params.pooling_type)(_POOLING[given.pooling])
    if given.rope_scaling:
        params.rope_scaling_type = _ROPE[given.rope_scaling]
    if given.rope_scale:
        params.rope_freq_scale = 1 / given.rope_scale
    if given.mmproj:
        params.mmproj.path, params.mmproj_use_gpu = given.mmproj, False
    if given.spec_type:
        _draft(params.speculative, given)
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM})
    del server


def _draft(drafts: Any, given: argparse.Namespace) -> None:
    drafts.types = [type(drafts.types[0])(_DRAFTS[given.spec_type])]
    if given.spec_draft_model:
        drafts.draft.mparams.path = given.spec_draft_model
        drafts.draft.n_max = given.spec_draft_n_max
        drafts.draft.cache_type_k = _TYPES[given.spec_draft_type_k]
        drafts.draft.cache_type_v = _TYPES[given.spec_draft_type_v]
        return
    drafts.ngram_simple.size_m = given.spec_ngram_simple_size_m
    drafts.ngram_simple.size_n = given.spec_ngram_simple_size_n


def main(arguments: Sequence[str]) -> None:
    """Do what llama-server does with its arguments."""
    if "--version" in arguments:
        sys.stderr.write(f"{VERSION}\n")
    elif "--list-devices" in arguments:
        sys.stdout.write(f"Available devices:\n{os.environ.get(DEVICES_VARIABLE, '  (none)')}\n")
    elif "--help" in arguments:
        sys.stdout.write(_parser().format_help())
    else:
        _serve(_parser().parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
