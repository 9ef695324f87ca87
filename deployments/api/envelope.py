"""The body of every error, a superset that OpenAI's and Pharia's clients both read."""

import orjson
from pydantic import BaseModel

from deployments.errors import EmbeddingError


def error_body(error: EmbeddingError) -> bytes:
    """Return the error as JSON."""
    return orjson.dumps({"error": error_detail(error), "code": error.code})


def error_detail(error: EmbeddingError) -> dict[str, str | None]:
    """Return what `ErrorDetail` describes."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every error. `code` stands twice since Pharia's clients read the outer one."""

    error: ErrorDetail
    code: str
