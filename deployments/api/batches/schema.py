"""OpenAI's files and batches, as they are shown, stored and described."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ENDPOINT = "/v1/embeddings"
WINDOW = "24h"
WINDOW_SECONDS = 24 * 3600
METHOD = "POST"
# OpenAI's own limits.
MAX_PAIRS, MAX_NAME, MAX_VALUE = 16, 64, 512
MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 24 * 3600
CREATED = "created_at"
# The reason that OpenAI gives for what there was no time for.
EXPIRED = "batch_expired"
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
FINAL: frozenset[Status] = frozenset(("failed", "completed", "expired", "cancelled"))
Metadata = dict[str, str]


class FileObject(BaseModel):
    """A file: what a batch reads, or what came out of one."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Its size.")
    created_at: int = Field(description="Seconds since 1970, as all times here.")
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = Field(None, description="When it is removed.")


class Listing(BaseModel):
    """A part of what there is, with the ids of its ends."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(Listing):
    """A part of the files."""

    data: list[FileObject]


class DeletedFile(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchError(BaseModel):
    """Why a batch failed as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(BaseModel):
    """The first of the reasons."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class InputTokens(BaseModel):
    """OpenAI's detail of tokens read."""

    cached_tokens: int = 0


class OutputTokens(BaseModel):
    """OpenAI's detail of tokens written, of which embeddings have none."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens that the models read for a batch."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    output_tokens_details: OutputTokens = OutputTokens()
    total_tokens: int = 0


class Batch(BaseModel):
    """A batch, and how far it is."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(None, description="The model, where all lines name the same one.")
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage = BatchUsage()
    metadata: Metadata | None = None


class BatchList(Listing):
    """A part of the batches, the newest first."""

    data: list[Batch]


class OutputExpiry(BaseModel):
    """How long what comes out is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)]


class BatchBody(BaseModel):
    """The body of `POST /batches`. Fields that are null count as absent."""

    model_config = ConfigDict(
        title="BatchRequest",
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0193b2f0a1c07f3a9c41d2e8",
                    "endpoint": ENDPOINT,
                    "completion_window": WINDOW,
                    "metadata": {"job": "nightly"},
                }
            ]
        },
    )

    input_file_id: Annotated[str, Field(min_length=1)] = Field(
        description="A file of `POST /files` with the purpose `batch`, one request on each line."
    )
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=MAX_NAME)],
                Annotated[str, Field(max_length=MAX_VALUE)],
            ],
            Field(max_length=MAX_PAIRS),
        ]
        | None
    ) = Field(None, description="Yours; given back with the batch.")
    output_expires_after: OutputExpiry | None = None
