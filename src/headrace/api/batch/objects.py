"""The objects of /v1/files and /v1/batches, as OpenAI's API has them and as they are kept."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from headrace.api.batch.lines import Fault, Tally
from headrace.api.fields import Body

State = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ACTIVE: frozenset[State] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
Lifetime = Annotated[int, Meta(ge=3600, le=30 * 86400)]


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file: the requests of a batch, or its answers."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileForm(msgspec.Struct, frozen=True, kw_only=True):
    """A form with a file; `expires_after[seconds]` is how long it is kept."""

    file: Annotated[bytes, Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["batch"]


class Faults(msgspec.Struct, frozen=True):
    """The errors of a batch that cannot be run."""

    data: tuple[Fault, ...]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct, frozen=True):
    """The requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(msgspec.Struct, frozen=True):
    """Tokens of prompts that were taken from a cache."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    """Tokens of answers that were thinking."""

    reasoning_tokens: int


class BatchUsage(msgspec.Struct, frozen=True):
    """The tokens of a batch."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


def usage_of(tally: Tally) -> BatchUsage:
    """Return the tokens of a tally."""
    return BatchUsage(
        tally.read,
        InputDetails(tally.cached),
        tally.written,
        OutputDetails(tally.thought),
        tally.read + tally.written,
    )


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, in one of OpenAI's states. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: Faults | None = None
    input_file_id: str
    completion_window: str
    status: State = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Expiry(msgspec.Struct, frozen=True, kw_only=True):
    """How long files are kept."""

    anchor: Literal["created_at"]
    seconds: Lifetime


class BatchRequest(Body, frozen=True, kw_only=True):
    """OpenAI's request for a batch. `completion_window` is 24h, or as many h or d, to 30d."""

    input_file_id: Annotated[str, Meta(max_length=64)]
    endpoint: Annotated[str, Meta(max_length=64)]
    completion_window: Annotated[str, Meta(pattern="^([1-9][0-9]{0,2}h|[1-9]d|[12][0-9]d|30d)$")]
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Expiry | None = None

    @property
    def window_s(self) -> int:
        """The time for the batch, in seconds."""
        return (
            int(self.completion_window[:-1]) * {"h": 3600, "d": 86400}[self.completion_window[-1]]
        )


class KeptFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file, and whose it is: a short id of a key."""

    owner: str
    file: FileObject


class KeptBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, and whose it is; the files of its answers are kept for `lifetime_s`."""

    owner: str
    is_admin: bool
    lifetime_s: int
    answers_id: str
    errors_id: str
    batch: Batch

    def change(self, status: State | UnsetType = UNSET, **fields: object) -> KeptBatch:
        """Return it in another state, since now, and with other fields."""
        if status is not UNSET:
            fields |= {"status": status, f"{status}_at": int(time.time())}
        return msgspec.structs.replace(self, batch=msgspec.structs.replace(self.batch, **fields))


def new_id(prefix: str) -> str:
    """Return an id for a file or a batch."""
    return prefix + secrets.token_hex(12)
