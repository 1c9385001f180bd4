"""The module that vLLM imports in each rank, as `worker_extension_cls`, before it takes a GPU."""

from headrace.engines.vllm.core import Rank, tether_rank

__all__ = ["Rank"]

tether_rank()
