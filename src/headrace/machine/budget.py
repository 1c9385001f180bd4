"""How much of each device models may take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headrace.core.errors import ConfigError
from headrace.machine.device import HOST, Device

_SHARES = {"cpu": 80, "cuda": 90}
_AMOUNT = re.compile(r"(?:(?P<device>[^=]+)=)?(?P<number>\d+(?:\.\d+)?) ?(?P<unit>%|[a-z]+)", re.I)
_UNITS = {
    "%": 0.01,
    "b": 1,
    **{f"{c}{end}": 1 << 10 * n for n, c in enumerate("kmgt", 1) for end in ("", "i", "ib")},
    **{f"{c}b": 1000**n for n, c in enumerate("kmgt", 1)},
}


def budgets(setting: Sequence[str], devices: Sequence[Device]) -> dict[str, int]:
    """Return how many bytes models may take of each device, by its key.

    `setting` are amounts like `16GiB` or `80%`, of the host, and `cuda:0=50%` or `cpu=16GiB`.
    Without any it is 80 % of the host and 90 % of a GPU.

    Raises:
        ConfigError: an amount is not understood, or there is no such device, or not so much of it.
    """
    totals = {device.key: device.total for device in devices}
    amounts = {device.key: device.total * _SHARES[device.kind] // 100 for device in devices}
    for word in setting:
        key, amount = _amount(word, totals)
        amounts[key] = amount
    return amounts


def _amount(word: str, totals: dict[str, int]) -> tuple[str, int]:
    match = _AMOUNT.fullmatch(word.strip())
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"Memory {word!r}: it is like 16GiB, 80%, cpu=16GiB or cuda:0=90%.")
    key = (match["device"] or HOST).strip().lower()
    if key not in totals:
        raise ConfigError(f"Memory {word!r}: there is no device {key}, but {', '.join(totals)}.")
    share = totals[key] if match["unit"] == "%" else 1
    amount = int(float(match["number"]) * factor * share)
    if not 0 < amount <= totals[key]:
        raise ConfigError(f"Memory {word!r}: {key} has {totals[key]} bytes; give some of them.")
    return key, amount
