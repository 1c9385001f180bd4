from __future__ import annotations

import re

import msgspec
import pytest

from headrace.core import errors
from headrace.core.errors import (
    GenerationFailed,
    HeadraceError,
    OutOfMemory,
    from_record,
    kinds,
    to_record,
)
from headrace.core.metrics import InferenceMetrics


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_every_error_crosses_a_process_boundary(kind: type[HeadraceError]) -> None:
    """W17: an error arrives as the type it was, with all of its fields."""
    metrics = InferenceMetrics(started_at=3.0, chunks=2)
    error = kind("m", param="p", detail="d", retry_after_s=1.5, metrics=metrics)
    packed = msgspec.msgpack.encode(to_record(error))
    again = from_record(msgspec.msgpack.decode(packed, type=errors.ErrorRecord))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == "m"


def test_the_families_answer_what_the_caller_does() -> None:
    """W17: every leaf belongs to one family."""
    families = (errors.RequestError, errors.CapacityError, errors.EngineError, errors.ConfigError)
    for kind in list(kinds())[1:]:
        assert sum(issubclass(kind, family) for family in families) == 1
    drawn = re.findall(r"[A-Z]\w+", str(errors.__doc__).partition("HeadraceError\n")[2])
    assert [kind.__name__ for kind in list(kinds())[1:]] == drawn


def test_a_foreign_exception_keeps_its_text_for_the_log_alone() -> None:
    """W17: the client gets a stable message; what the library said is the detail."""
    record = to_record(ValueError("secret path"))
    error = from_record(record)
    assert isinstance(error, GenerationFailed)
    assert error.message == "The engine failed."
    assert error.detail == "ValueError: secret path"


def test_an_unknown_kind_is_still_an_error() -> None:
    """W17: a record of a newer version is not lost."""
    assert type(from_record(errors.ErrorRecord(kind="Newer", message="m"))) is GenerationFailed
    assert type(from_record(to_record(OutOfMemory("m")))) is OutOfMemory
