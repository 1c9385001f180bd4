"""The environment of a child process: what engines need, and none of the service's secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from headrace.core.values import names_secret

_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "HOSTNAME"),
        *("TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH"),
        *("XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "CC", "CXX", "DO_NOT_TRACK", "SOURCE_DATE_EPOCH"),
    }
)
_PREFIXES = (
    *("LC_", "PYTHON", "COVERAGE_", "MALLOC_", "RUST_", "RAYON_"),
    # Drivers and numeric libraries.
    *(
        "CUDA_",
        "NVIDIA_",
        "NCCL_",
        "NVSHMEM_",
        "UCX_",
        "GLOO_",
        "NVTE_",
        "CUBLAS_",
        "CUDNN_",
        "HIP_",
        "ROCR_",
        "HSA_",
        "GPU_",
    ),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "ONEDNN_"),
    *("DNNL_", "ONEAPI_", "SYCL_", "ZE_"),
    # Engines, and the libraries below them.
    *("GGML_", "LLAMA_", "OPENVINO_", "OV_", "TORCH", "PYTORCH_", "TRITON_", "XFORMERS_"),
    *("VLLM_", "FLASHINFER_", "SAFETENSORS_", "TOKENIZERS_", "TIKTOKEN_", "ACCELERATE_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_", "LLGUIDANCE_"),
)
NOTHING: Mapping[str, str | None] = MappingProxyType({})
# By default OpenMP's threads spin 30 times longer: while another process needs a core, a load of
# half a second then takes five.
_DEFAULTS = {"GOMP_SPINCOUNT": "10000"}


def inherited(more: Mapping[str, str | None] = NOTHING) -> dict[str, str]:
    """Return the environment of a child, with a model's own variables in `more`.

    Of this process it has what engines and their libraries read, and nothing whose name is that
    of a secret. None in `more` is the value that this process has, if it has one.
    """
    passed = {name: value for name, value in os.environ.items() if is_inherited(name)}
    own = {name: os.environ.get(name) if value is None else value for name, value in more.items()}
    return _DEFAULTS | passed | {name: value for name, value in own.items() if value is not None}


def is_inherited(name: str) -> bool:
    """Whether every child gets a variable of this name."""
    return (name in _NAMES or name.startswith(_PREFIXES)) and not names_secret(name)
