"""LoRA adapters in torch: what each adds to the layers, for the rows of a batch that are its own.

A hook of each layer adds the product of two small matrices to the rows of the requests that have
the adapter. So a batch may have any mixture, and requests without one are computed as without any.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headrace.core.adapter import AdapterFile
from headrace.core.errors import GenerationFailed, LoadFailed
from headrace.models.adapter import PREFIX, WEIGHTS

_FIRST, _SECOND = ".lora_A.weight", ".lora_B.weight"


class Part(NamedTuple):
    """The rows of a request in a batch; the logits of the last `ends` of them are computed."""

    adapter: str
    rows: int
    ends: int


class _Pair(NamedTuple):
    """The matrices of an adapter at a layer; the second has its scale."""

    first: torch.Tensor
    second: torch.Tensor

    def change(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        linear, device = torch.nn.functional.linear, outputs.device
        first, second = self.first.to(device), self.second.to(device)
        return linear(linear(inputs.to(device, first.dtype), first), second).to(outputs.dtype)


class _Batch(NamedTuple):
    """The rows of each adapter, where all tokens are computed, and where only the last ones are."""

    tokens: int
    ends: int
    of_tokens: Mapping[str, torch.Tensor]
    of_ends: Mapping[str, torch.Tensor]

    def rows(self, count: int) -> Mapping[str, torch.Tensor]:
        if count == self.tokens:
            return self.of_tokens
        if count != self.ends:
            raise GenerationFailed(f"{count} rows are computed for {self.tokens} tokens.")
        return self.of_ends


class _Layer(NamedTuple):
    """A layer that adapters change: their matrices by their names, and what removes its hook."""

    pairs: dict[str, _Pair]
    hook: Any


class LowRank:
    """The adapters of a model. What is computed on a thread has those that it has set there.

    They change only while no pass of the model holds `turn`.
    """

    def __init__(self, model: Any, turn: threading.Lock) -> None:
        self._local = threading.local()
        self._device, self._dtype = model.device, model.dtype
        # The model is freed when the engine is closed.
        self._model = weakref.ref(model)
        self._layers: dict[str, _Layer] = {}
        self._turn = turn

    def add(self, file: AdapterFile) -> None:
        """Load an adapter. Blocking.

        Raises:
            LoadFailed: it changes what is no linear layer, and nothing was loaded.
        """
        model = self._model()
        assert model is not None, "nothing is added after the end"
        modules: dict[str, Any] = dict(model.named_modules())
        pairs: dict[str, _Pair] = {}
        for layer, pair in _pairs(file, self._dtype):
            module: Any = modules.get(layer)
            if not isinstance(module, torch.nn.Linear):
                raise LoadFailed(
                    f"Adapter {file.name}: {layer[:120]!r} is no linear layer in torch."
                )
            pairs[layer] = _placed(pair, module.weight.device)
        with self._turn:
            for layer, pair in pairs.items():
                if layer not in self._layers:
                    self._layers[layer] = self._attach(modules[layer])
                self._layers[layer].pairs[file.name] = pair

    def remove(self, name: str) -> None:
        """Free an adapter that no request has. Blocking."""
        with self._turn:
            for layer, (pairs, hook) in tuple(self._layers.items()):
                pairs.pop(name, None)
                if not pairs:
                    hook.remove()
                    del self._layers[layer]

    def all_rows(self, adapter: str) -> None:
        """Compute all rows with an adapter on this thread; with an empty name with none."""
        self._local.active = adapter

    def rows(self, parts: Sequence[Part]) -> None:
        """Compute the next batch on this thread with the adapters of its parts, in order."""
        if not any(part.adapter for part in parts):
            self._local.active = ""
            return
        of_tokens: dict[str, list[int]] = {}
        of_ends: dict[str, list[int]] = {}
        tokens, ends = itertools.count(), itertools.count()
        for part in parts:
            of_tokens.setdefault(part.adapter, []).extend(itertools.islice(tokens, part.rows))
            of_ends.setdefault(part.adapter, []).extend(itertools.islice(ends, part.ends))
        self._local.active = _Batch(
            next(tokens), next(ends), self._indices(of_tokens), self._indices(of_ends)
        )

    def _indices(self, rows: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor(numbers, device=self._device)
            for name, numbers in rows.items()
            if name and numbers
        }

    def _attach(self, module: torch.nn.Module) -> _Layer:
        pairs: dict[str, _Pair] = {}

        def add(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            del module
            active: _Batch | str = getattr(self._local, "active", "")
            return _changed(active, pairs, args[0], output) if active else output

        return _Layer(pairs, module.register_forward_hook(add))


def _changed(
    active: _Batch | str, pairs: Mapping[str, _Pair], inputs: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    if isinstance(active, str):
        pair = pairs.get(active)
        return output if pair is None else output + pair.change(inputs, output)
    flat, result = inputs.reshape(-1, inputs.shape[-1]), output.view(-1, output.shape[-1])
    for name, index in active.rows(len(flat)).items():
        if (pair := pairs.get(name)) is not None:
            result.index_add_(0, index, pair.change(flat[index], result))
    return output


def _pairs(file: AdapterFile, dtype: torch.dtype) -> Iterator[tuple[str, _Pair]]:
    library: Any = import_module("safetensors.torch")  # without types
    tensors: dict[str, Any] = library.load_file(Path(file.path) / WEIGHTS)
    for name, first in tensors.items():
        if not name.endswith(_FIRST):
            continue
        layer, rank = name.removesuffix(_FIRST), first.shape[0]
        scale = file.scale * file.alpha / (math.sqrt(rank) if file.root_rank else rank)
        second = tensors[layer + _SECOND].float() * scale
        yield layer.removeprefix(PREFIX), _Pair(first.to(dtype), second.to(dtype))


def _placed(pair: _Pair, device: torch.device) -> _Pair:
    # A layer whose weights are moved to a device for each step has none of its own.
    return pair if device.type == "meta" else _Pair(*(half.to(device) for half in pair))


class _Tokens(NamedTuple):
    """What the manager's cache reads of a request."""

    request_id: str
    status: Any
    initial_tokens: list[int]
    generated_tokens: list[int]


class Names:
    """The names of requests at the manager, whose cache knows by them what may be shared.

    It knows a block of its cache by its tokens. Those of an adapter have numbers beyond the
    vocabulary there.
    """

    def __init__(self, vocabulary: int) -> None:
        self._shifts = {"": 0}
        self._beyond = itertools.count(vocabulary, vocabulary)
        self._numbers = itertools.count()

    def add(self, adapter: str) -> None:
        """Keep what is cached for an adapter apart from all others, also from those of before."""
        self._shifts[adapter] = next(self._beyond)

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        del self._shifts[adapter]

    def next(self, adapter: str) -> str:
        """Return a name for a request."""
        return f"{self._shifts[adapter]}:{next(self._numbers)}"

    def keep_apart(self, cache: Any) -> None:
        """Let a cache share what requests of one adapter have in common, and no others."""
        search, mark = cache.search_prefix_match, cache.mark_complete_blocks

        def search_apart(name: str, token_ids: list[int]) -> int:
            return search(name, _shifted(name, token_ids))

        def mark_apart(state: Any, complete_blocks: Mapping[str, int]) -> None:
            if complete_blocks and not state.request_id.startswith("0:"):
                name, text = state.request_id, state.initial_tokens + state.generated_tokens
                state = _Tokens(name, state.status, _shifted(name, text), [])
            mark(state, complete_blocks)

        cache.search_prefix_match, cache.mark_complete_blocks = search_apart, mark_apart


def _shifted(name: str, token_ids: list[int]) -> list[int]:
    shift = int(name.partition(":")[0])
    return [token + shift for token in token_ids] if shift else token_ids
