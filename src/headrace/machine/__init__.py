"""The machine: system information, devices and their use, processes."""

from headrace.machine.facts import SystemInfo, attributes, system
from headrace.machine.hardware import (
    HOST,
    Device,
    allowed_cpus,
    budgets,
    devices,
    host_memory,
    usable_cpus,
    visibility,
)
from headrace.machine.process import (
    Family,
    die_with_parent,
    keep_descendants,
    kill_marked,
    loop_factory,
    process_memory,
    raise_open_files,
    share_malloc_arena,
    shorten_switch_interval,
    tune_garbage_collection,
)
from headrace.machine.sampler import Measurement, Sampler

__all__ = [
    "HOST",
    "Device",
    "Family",
    "Measurement",
    "Sampler",
    "SystemInfo",
    "allowed_cpus",
    "attributes",
    "budgets",
    "devices",
    "die_with_parent",
    "host_memory",
    "keep_descendants",
    "kill_marked",
    "loop_factory",
    "process_memory",
    "raise_open_files",
    "share_malloc_arena",
    "shorten_switch_interval",
    "system",
    "tune_garbage_collection",
    "usable_cpus",
    "visibility",
]
