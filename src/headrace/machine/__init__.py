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
)
from headrace.machine.process import (
    die_with_parent,
    process_memory,
    shorten_switch_interval,
    tune_garbage_collection,
)
from headrace.machine.sampler import Measurement, Sampler

__all__ = [
    "HOST",
    "Device",
    "Measurement",
    "Sampler",
    "SystemInfo",
    "allowed_cpus",
    "attributes",
    "budgets",
    "devices",
    "die_with_parent",
    "host_memory",
    "process_memory",
    "shorten_switch_interval",
    "system",
    "tune_garbage_collection",
    "usable_cpus",
]
