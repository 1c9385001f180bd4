"""Brings a model folder into torch: device, type, attention, quantisation, tokenizer."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import sys
from typing import Any

import torch
import transformers

from headrace.core.errors import ConfigError, HeadraceError, LoadFailed, OutOfMemory
from headrace.engines.transformers_answer import failure

_DEVICES = ("cuda", "mps", "cpu")


def pick_device(wanted: str) -> str:
    """Return the device that is used: the one asked for, or the best there is.

    Raises:
        LoadFailed: the one asked for is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = next(name for name in _DEVICES if there[name])
    if not there.get(wanted.partition(":")[0]):
        here = [name for name in _DEVICES if there[name]]
        raise LoadFailed(f"This torch has no device {wanted}; it has {', '.join(here)}.")
    return "cuda:0" if wanted == "cuda" else wanted


def load(path: str, device: str, arguments: dict[str, Any], *, trusted: bool) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder. `arguments` are those of `from_pretrained`.

    Raises:
        LoadFailed, OutOfMemory: as the library says.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    common = {"local_files_only": True, "trust_remote_code": trusted}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **common)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, **arguments, **common
        )
        if "device_map" not in arguments:
            model = model.to(device)
    except (RuntimeError, OSError, ValueError) as error:
        raise _refusal(error) from error
    return model.eval(), tokenizer


def quantization(kind: str, device: str, dtype: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for 8 or 4 bits.

    Raises:
        ConfigError: bitsandbytes or CUDA is missing.
    """
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {kind} needs bitsandbytes: pip install bitsandbytes")
    if not device.startswith("cuda"):
        raise ConfigError(f"quantization {kind} needs a CUDA device, and this is {device}.")
    compute = torch.bfloat16 if dtype == "auto" else dtype
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind == "int4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def placement(device_map: str | None, max_memory: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a model over devices.

    Raises:
        ConfigError: accelerate is missing.
    """
    if device_map is None:
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("device_map needs accelerate: pip install accelerate")
    # Its GPUs are numbers.
    most = {
        int(key.partition(":")[2] or 0) if key.startswith("cuda") else key: value
        for key, value in max_memory.items()
    }
    return {"device_map": device_map, "max_memory": most or None}


def is_spread(model: Any) -> bool:
    """Tell whether a model is on more than one device."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    own: int | list[int] | None = model.generation_config.eos_token_id
    listed = [own] if own is None or isinstance(own, int) else own
    return frozenset(one for one in (*listed, tokenizer.eos_token_id) if one is not None)


def give_back() -> None:
    """Return what torch has freed to the device and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _refusal(error: Exception) -> HeadraceError:
    said = str(error)
    found = failure(said)
    if isinstance(found, OutOfMemory):
        return found
    if "trust_remote_code" in said:
        return LoadFailed(
            "The model brings code of its own; it is run only with trust_remote_code and a "
            "pinned revision.",
            detail=said,
        )
    return LoadFailed("transformers could not load the model.", detail=said)
