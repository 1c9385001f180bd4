"""The documented name of `headrace.lab.cases`: the cases that every engine has to pass."""

from headrace.lab.cases import (
    CASES,
    KINDS,
    Case,
    Kind,
    Outcome,
    Result,
    Subject,
    concerns,
    examine,
    opened,
)

__all__ = [
    "CASES",
    "KINDS",
    "Case",
    "Kind",
    "Outcome",
    "Result",
    "Subject",
    "concerns",
    "examine",
    "opened",
]
