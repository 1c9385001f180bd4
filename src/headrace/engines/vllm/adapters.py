"""LoRA adapters as vLLM takes them: its engine arguments, its requests, and their first load."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.core.adapter import MAX_ADAPTERS, AdapterFile
from headrace.core.errors import GenerationFailed, LoadFailed, Unsupported, WorkerDied
from headrace.engines.vllm.call import failure
from headrace.models.adapter import CONFIG, WEIGHTS
from headrace.models.folder import read_json

# The ranks that it has buffers for, and the adapters that one of its batches has here at most.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TOGETHER = 16
# The rank that there is room for by default, as in vLLM, where no adapter is configured.
_RANK = 16


def lora_arguments(
    adapters: Sequence[AdapterFile], device: str, given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return vLLM's engine arguments for adapters; empty without.

    `given` are configured ones: `max_loras` in a batch and `max_lora_rank` make room for adapters
    that are added later.
    """
    together, rank = given.get("max_loras"), given.get("max_lora_rank", 0)
    if not adapters and not together:
        return {}
    least = rank or (0 if adapters else _RANK)
    largest = max([least, *(adapter.rank for adapter in adapters)])
    together = together or min(len(adapters), _TOGETHER)
    if device == "cpu":
        # Its build for CPUs applies what is in the last place to requests without an adapter that
        # are beside others with one (0.32): that place stays empty.
        together = max(together, len(adapters) + 1)
    return {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= largest),
        "max_loras": together,
        # None is dropped, to be loaded again within a step.
        "max_cpu_loras": max(MAX_ADAPTERS, together),
    }


def adapter_folder(adapter: AdapterFile, private: Path) -> str:
    """Return a folder for vLLM, which has no scale of its own: it is in the alpha of a copy."""
    if adapter.scale == 1:
        return adapter.path
    source, folder = Path(adapter.path), private / f"adapter-{len([*private.iterdir()])}"
    folder.mkdir()
    config = read_json(source / CONFIG) | {"lora_alpha": adapter.alpha * adapter.scale}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).symlink_to((source / WEIGHTS).absolute())
    return str(folder)


class Adapters:
    """The adapters of a loaded model, as vLLM's LoRARequests by their names."""

    def __init__(self, files: Sequence[AdapterFile], private: Path, config: Any) -> None:
        """Check the configuration of each; `private` is a folder for changed copies.

        Raises:
            LoadFailed: vLLM does not support what an adapter's configuration says.
        """
        self._private, self._config = private, config
        self._added = set[str]()
        self._requests = dict[str, Any]()
        self._numbers = itertools.count(1)
        for file in files:
            self._put(file)

    def add(self, file: AdapterFile, device: str) -> None:
        """Take another adapter, which is loaded for its first request.

        Raises:
            Unsupported: vLLM was started without a place for it.
            LoadFailed: it does not support what the adapter's configuration says.
        """
        lora = self._config.lora_config
        if lora is None or file.rank > lora.max_lora_rank:
            raise Unsupported("vLLM was started without room for adapters of this rank.")
        if lora.max_loras < _TOGETHER and len(self._requests) >= lora.max_loras - (device == "cpu"):
            raise Unsupported("vLLM was started with fewer places for adapters.")
        self._put(file)

    async def remove(self, name: str, llm: Any) -> None:
        """Let vLLM forget an adapter, which no request has."""
        request = self._requests.pop(name)
        if name in self._added:
            self._added.discard(name)
            await llm.remove_lora(request.lora_int_id)

    def _put(self, file: AdapterFile) -> None:
        folder = adapter_folder(file, self._private)
        number = next(self._numbers)
        self._requests[file.name] = _request(file.name, number, folder, self._config)

    async def loaded(self, name: str, llm: Any, core: str) -> Any:
        """Return the LoRARequest of an adapter that vLLM has loaded; None for no name.

        One that fails to load in a step, as vLLM does by itself, ends the engine core. `core` is
        the error of the core.

        Raises:
            GenerationFailed: vLLM refuses the adapter.
            WorkerDied: the core is dead.
        """
        request = self._requests.get(name)
        if request is None or name in self._added:
            return request
        try:
            await llm.add_lora(request)
        except Exception as error:
            # Any exception of the library becomes a HeadraceError.
            if isinstance(failed := failure(error, core), WorkerDied):
                raise failed from error
            reason = f"vLLM could not load the adapter {name}."
            raise GenerationFailed(reason, detail=str(error)) from error
        self._added.add(name)
        return request


def _request(name: str, number: int, folder: str, config: Any) -> Any:
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    try:
        PEFTHelper.from_local_dir(folder, None).validate_legal(config.lora_config)
    except Exception as error:
        # Any exception of the library becomes a HeadraceError.
        raise LoadFailed(f"Adapter {name}: vLLM does not support it: {error}") from error
    return LoRARequest(name, number, folder)
