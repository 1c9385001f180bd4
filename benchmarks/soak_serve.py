"""`headrace serve` for soak.py: each line on its input is answered with what its memory is made of.

The answer is a line of JSON (`facts`). It ends with its input, as the server of `lab.drive` does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
from collections import Counter
from typing import Any

from headrace.cli import main


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def facts() -> dict[str, Any]:
    """Return what is alive, by type, what was garbage, and the bytes that malloc has."""
    before = _types()
    gc.collect()
    types = _types()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return {
        "blocks": sys.getallocatedblocks(),
        "used": info.uordblks + info.hblkhd,
        "free": info.fordblks,
        "types": types,
        "garbage": before - types,
    }


def _types() -> Counter[str]:
    kinds = map(type, gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def _follow() -> None:
    for _ in sys.stdin:
        print(json.dumps(facts()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow, daemon=True).start()
    main()
