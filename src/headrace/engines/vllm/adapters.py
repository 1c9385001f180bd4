"""LoRA adapters as vLLM takes them: its engine arguments, its requests, and their first load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.core.adapter import AdapterFile
from headrace.core.errors import GenerationFailed, LoadFailed, WorkerDied
from headrace.engines.vllm.call import failure
from headrace.models.adapter import CONFIG, WEIGHTS
from headrace.models.folder import read_json

# The ranks that it has buffers for, and the adapters that one of its batches has here at most.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TOGETHER = 16


def lora_arguments(
    adapters: Sequence[AdapterFile], device: str, together: int | None = None
) -> dict[str, Any]:
    """Return vLLM's engine arguments for adapters, `together` in a batch; empty without."""
    if not adapters:
        return {}
    largest = max(adapter.rank for adapter in adapters)
    together = together or min(len(adapters), _TOGETHER)
    if device == "cpu":
        # Its build for CPUs applies what is in the last place to requests without an adapter that
        # are beside others with one (0.32): that place stays empty.
        together = max(together, len(adapters) + 1)
    return {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= largest),
        "max_loras": together,
        "max_cpu_loras": max(len(adapters), together),
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
        self._added = set[str]()
        self._requests = dict[str, Any]()
        for number, file in enumerate(files, 1):
            folder = adapter_folder(file, private)
            self._requests[file.name] = _request(file.name, number, folder, config)

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
