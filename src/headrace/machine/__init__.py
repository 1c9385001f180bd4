"""The machine: system information, devices and their use, processes."""

from headrace.machine.facts import SystemInfo, attributes, system
from headrace.machine.hardware import (
    HOST,
    Device,
    budgets,
    devices,
    host_memory,
    visibility,
)
from headrace.machine.process import (
    Family,
    die_with_parent,
    keep_descendants,
    kill_marked,
    process_memory,
    raise_open_files,
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
    "attributes",
    "budgets",
    "devices",
    "die_with_parent",
    "host_memory",
    "keep_descendants",
    "kill_marked",
    "process_memory",
    "raise_open_files",
    "shorten_switch_interval",
    "system",
    "tune_garbage_collection",
    "visibility",
]
