"""What the machine is and how full and busy it is: system information, devices, a sampler."""

from headrace.machine.facts import SystemInfo, attributes, system
from headrace.machine.hardware import HOST, Device, budgets, devices, host_memory
from headrace.machine.process import die_with_parent, process_memory
from headrace.machine.sampler import Measurement, Sampler

__all__ = [
    "HOST",
    "Device",
    "Measurement",
    "Sampler",
    "SystemInfo",
    "attributes",
    "budgets",
    "devices",
    "die_with_parent",
    "host_memory",
    "process_memory",
    "system",
]
