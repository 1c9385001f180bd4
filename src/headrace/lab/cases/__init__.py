"""The contract of an engine as cases that run on any engine, also on those of other packages.

`headrace check-engine` and the tests run them. A case is a function of a Subject, a model that is
loaded on the engine behind one kind of Backend; `examine` runs a case and returns its outcome.
"""

from __future__ import annotations

from headrace.lab.cases import (
    adapters,
    answers,
    audio,
    drafts,
    facts,
    forms,
    images,
    limits,
    prompts,
    sampling,
    tools,
    turns,
    vectors,
)
from headrace.lab.cases.case import Case, Outcome, Result, concerns, examine
from headrace.lab.cases.subject import KINDS, Kind, Subject, opened

CASES: tuple[Case, ...] = (
    *facts.CASES,
    *answers.CASES,
    *sampling.CASES,
    *prompts.CASES,
    *forms.CASES,
    *limits.CASES,
    *tools.CASES,
    *images.CASES,
    *audio.CASES,
    *turns.CASES,
    *drafts.CASES,
    *vectors.CASES,
    *adapters.CASES,
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
