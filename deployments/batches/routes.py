"""The routes of files and batches (OpenAI), and their documentation."""

from collections.abc import Iterator
from typing import Any

from fastapi.responses import StreamingResponse

from deployments.api.batches.schema import (
    ENDPOINT,
    MAX_EXPIRY_SECONDS,
    MIN_EXPIRY_SECONDS,
    WINDOW,
    Batch,
    BatchBody,
    BatchList,
    DeletedFile,
    FileList,
    FileObject,
)
from deployments.api.batches.upload import FILE
from deployments.batches.serving import (
    CONTENT_TYPE,
    DEFAULT_BATCHES,
    FORM_EXPIRY,
    MAX_BATCHES,
    MAX_FILES,
    PURPOSE,
    BatchServing,
)
from deployments.errors import (
    BatchMissingError,
    BodyTooLargeError,
    DeadlineExceededError,
    EmbeddingError,
    FileMissingError,
    InvalidKeyError,
    InvalidRequestError,
    QuotaError,
    RateLimitError,
    StorageUnavailableError,
    UnsupportedEncodingError,
)
from deployments.http.table import Entry, answers

FILE_OBJECT = {
    "id": "file-0193b2f0a1c07f3a9c41d2e8",
    "object": "file",
    "bytes": 1834,
    "created_at": 1764000000,
    "filename": "requests.jsonl",
    "purpose": PURPOSE,
    "status": "processed",
    "expires_at": 1766592000,
}
BATCH_OBJECT = Batch(
    id="batch_0193b2f0a1c9c41d2e87f3a0",
    endpoint=ENDPOINT,
    model="all-minilm-l6-v2",
    input_file_id=str(FILE_OBJECT["id"]),
    completion_window=WINDOW,
    status="in_progress",
    created_at=1764000001,
    in_progress_at=1764000002,
    expires_at=1764086401,
    metadata={"job": "nightly"},
).model_dump()
DELETED = {"id": FILE_OBJECT["id"], "object": "file", "deleted": True}
ALWAYS = (InvalidKeyError, StorageUnavailableError, EmbeddingError)
MAKING = (
    *ALWAYS,
    QuotaError,
    RateLimitError,
    InvalidRequestError,
    BodyTooLargeError,
    UnsupportedEncodingError,
    DeadlineExceededError,
)
PAGE = {"object": "list", "first_id": None, "last_id": None, "has_more": False}


def _query(name: str, what: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": what, "schema": schema}


AFTER = _query("after", "The id of the last one seen.", type="string")
ORDER = _query("order", "By the time of creation.", type="string", enum=["asc", "desc"], default="desc")
FILE_QUERY = [
    _query("limit", "How many at most.", type="integer", minimum=1, maximum=MAX_FILES, default=MAX_FILES),
    AFTER,
    ORDER,
    _query("purpose", "Only files of this purpose.", type="string"),
]
BATCH_QUERY = [
    _query(
        "limit", "How many at most.", type="integer", minimum=1, maximum=MAX_BATCHES, default=DEFAULT_BATCHES
    ),
    AFTER,
    ORDER,
]
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FILE, "purpose"],
                    "properties": {
                        FILE: {
                            "type": "string",
                            "format": "binary",
                            "description": "One request on each line.",
                        },
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        f"{FORM_EXPIRY}[anchor]": {"type": "string", "enum": ["created_at"]},
                        f"{FORM_EXPIRY}[seconds]": {
                            "type": "integer",
                            "minimum": MIN_EXPIRY_SECONDS,
                            "maximum": MAX_EXPIRY_SECONDS,
                        },
                    },
                    "dependentRequired": {
                        f"{FORM_EXPIRY}[{one}]": [f"{FORM_EXPIRY}[{other}]"]
                        for one, other in (("anchor", "seconds"), ("seconds", "anchor"))
                    },
                },
            }
        },
    }
}
CONTENT: dict[int | str, Any] = {
    200: {"content": {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def batch_routes(served: BatchServing) -> Iterator[Entry]:
    """Yield what OpenAI's `client.files` and `client.batches` ask for."""
    files = answers(
        PAGE | {"data": [FILE_OBJECT]},
        *ALWAYS,
        InvalidRequestError,
        model=FileList,
    )
    batches = answers(
        PAGE | {"data": [BATCH_OBJECT]},
        *ALWAYS,
        InvalidRequestError,
        model=BatchList,
    )
    one_file = (*ALWAYS, FileMissingError)
    one_batch = (*ALWAYS, BatchMissingError)
    yield Entry(
        path="/files",
        handler=served.upload,
        method="POST",
        summary="Store a file of requests for a batch, one on each line (OpenAI).",
        name="upload_file",
        responses=answers(FILE_OBJECT, *MAKING, model=FileObject),
        document=FORM,
    )
    yield Entry(
        path="/files",
        handler=served.files,
        method="GET",
        summary="List your files, the newest first (OpenAI).",
        name="list_files",
        responses=files,
        document={"parameters": FILE_QUERY},
    )
    yield Entry(
        path="/files/{file_id}",
        handler=served.file,
        method="GET",
        summary="Show a file (OpenAI).",
        name="file",
        responses=answers(FILE_OBJECT, *one_file, model=FileObject),
    )
    yield Entry(
        path="/files/{file_id}",
        handler=served.delete,
        method="DELETE",
        summary="Remove a file and what is in it (OpenAI).",
        name="delete_file",
        responses=answers(DELETED, *one_file, model=DeletedFile),
    )
    yield Entry(
        path="/files/{file_id}/content",
        handler=served.content,
        method="GET",
        summary="Send what is in a file (OpenAI).",
        name="file_content",
        response_class=StreamingResponse,
        responses=answers(None, *one_file) | CONTENT,
    )
    yield Entry(
        path="/batches",
        handler=served.create,
        method="POST",
        summary="Embed what a file asks for, as bulk work (OpenAI).",
        name="create_batch",
        responses=answers(BATCH_OBJECT, *MAKING, FileMissingError, model=Batch),
        bodies=(BatchBody,),
    )
    yield Entry(
        path="/batches",
        handler=served.batches,
        method="GET",
        summary="List your batches, the newest first (OpenAI).",
        name="list_batches",
        responses=batches,
        document={"parameters": BATCH_QUERY},
    )
    yield Entry(
        path="/batches/{batch_id}",
        handler=served.batch,
        method="GET",
        summary="Show a batch, and how far it is (OpenAI).",
        name="batch",
        responses=answers(BATCH_OBJECT, *one_batch, model=Batch),
    )
    yield Entry(
        path="/batches/{batch_id}/cancel",
        handler=served.cancel,
        method="POST",
        summary="Let a batch end; what is done is kept (OpenAI).",
        name="cancel_batch",
        responses=answers(
            BATCH_OBJECT | {"status": "cancelling"}, *one_batch, InvalidRequestError, model=Batch
        ),
    )
