"""OpenAI's batches: the body that makes one, the lines that go in, the lines and objects that come out.

What is wrong with a single line is that line's error and stops no other one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from deployments.api import fields as read
from deployments.api.batches.schema import (
    CREATED,
    ENDPOINT,
    MAX_EXPIRY_SECONDS,
    MAX_NAME,
    MAX_PAIRS,
    MAX_VALUE,
    METHOD,
    MIN_EXPIRY_SECONDS,
    WINDOW,
    Metadata,
)
from deployments.api.encoding import error_body, error_detail
from deployments.errors import EmbeddingError, InvalidRequestError


@dataclass(frozen=True)
class NewBatch:
    """The body of `POST /batches`. `output_seconds` is how long what comes out is kept."""

    input_file_id: str
    metadata: Metadata | None
    output_seconds: int | None


def parse_create(fields: read.Fields) -> NewBatch:
    """Parse a body. Raises InvalidRequestError whose `param` names the field."""
    file_id = read.required_string(fields, "input_file_id")
    read.required_string(fields, "endpoint")
    read.choice(fields, "endpoint", (ENDPOINT,), ENDPOINT)
    read.required_string(fields, "completion_window")
    read.choice(fields, "completion_window", (WINDOW,), WINDOW)
    return NewBatch(file_id, _parse_metadata(fields), _parse_expiry(fields))


def _parse_metadata(fields: read.Fields) -> Metadata | None:
    pairs = fields.get("metadata")
    if pairs is None:
        return None
    if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
        raise InvalidRequestError("`metadata` must be an object of strings", "metadata")
    if len(pairs) > MAX_PAIRS or any(len(n) > MAX_NAME or len(v) > MAX_VALUE for n, v in pairs.items()):
        raise InvalidRequestError(
            f"`metadata` may hold {MAX_PAIRS} pairs, names of {MAX_NAME} characters, values of {MAX_VALUE}",
            "metadata",
        )
    return pairs


def _parse_expiry(fields: read.Fields) -> int | None:
    name = "output_expires_after"
    policy = fields.get(name)
    if policy is None:
        return None
    if not isinstance(policy, dict):
        raise InvalidRequestError(f"`{name}` must be an object", name)
    return expiry_seconds(policy.get("anchor"), policy.get("seconds"), name)


def expiry_seconds(anchor: Any, seconds: Any, name: str) -> int:
    """Return how long a file is kept. Raises InvalidRequestError."""
    if anchor != CREATED:
        raise InvalidRequestError(f"`{name}`'s anchor must be `{CREATED}`", name)
    # bool is a subclass of int, so the exact type is asked for.
    if type(seconds) is not int or not MIN_EXPIRY_SECONDS <= seconds <= MAX_EXPIRY_SECONDS:
        raise InvalidRequestError(
            f"`{name}`'s seconds must be {MIN_EXPIRY_SECONDS} to {MAX_EXPIRY_SECONDS}", name
        )
    return seconds


# --- lines in ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A request of a batch: `fields` is its body."""

    custom_id: str
    fields: dict[str, Any]

    @property
    def model(self) -> str | None:
        """The name of the model that it asks for."""
        name = self.fields.get("model")
        return name or None if isinstance(name, str) else None

    @property
    def inputs(self) -> int:
        """How many vectors it asks for, at most."""
        value = self.fields.get("messages", self.fields.get("input"))
        return len(value) if isinstance(value, list) and value and not isinstance(value[0], int | dict) else 1


class LineError(Exception):
    """A line isn't a request: by OpenAI's codes, with its `custom_id` as far as that could be read."""

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None):
        """Keep the reason."""
        super().__init__(code, message, param, custom_id)
        self.code, self.message, self.param, self.custom_id = code, message, param, custom_id


def parse_line(raw: bytes) -> Line:
    """Parse a line that isn't blank. Raises LineError, which quotes nothing but the `custom_id`."""
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise LineError("invalid_json_line", f"the line isn't valid JSON: {error.msg}") from None
    if not isinstance(line, dict):
        raise LineError("invalid_json_line", "the line must be a JSON object")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        what = "must be a string that isn't empty" if "custom_id" in line else "is missing"
        raise LineError("missing_required_parameter", f"`custom_id` {what}", "custom_id")
    if line.get("method") != METHOD:
        raise LineError("invalid_method", f"`method` must be `{METHOD}`", "method", custom_id)
    if line.get("url") != ENDPOINT:
        raise LineError("invalid_url", f"`url` must be `{ENDPOINT}`", "url", custom_id)
    fields = line.get("body")
    if not isinstance(fields, dict):
        raise LineError("missing_required_parameter", "`body` must be an object", "body", custom_id)
    return Line(custom_id, read.present(fields))


# --- lines out ------------------------------------------------------------------------------------


def result_line(request_id: str, custom_id: str, answer: bytes) -> bytes:
    """Return the output file's line of a request that was answered."""
    response = b'{"status_code":200,"request_id":"req_%b","body":%b}' % (request_id.encode(), answer)
    return _line(request_id, custom_id, response, b"null")


def refused_line(request_id: str, custom_id: str, error: EmbeddingError) -> bytes:
    """Return the error file's line of a request that was refused: the answer that HTTP would have given."""
    name, answer = request_id.encode(), error_body(error)
    response = b'{"status_code":%d,"request_id":"req_%b","body":%b}' % (error.status, name, answer)
    return _line(request_id, custom_id, response, orjson.dumps(error_detail(error)))


def unasked_line(request_id: str, number: int, error: LineError) -> bytes:
    """Return the error file's line of what was never asked; `number` is its line in the input file."""
    detail = {"code": error.code, "message": error.message, "param": error.param, "line": number}
    return _line(request_id, error.custom_id, b"null", orjson.dumps(detail))


def _line(request_id: str, custom_id: str | None, response: bytes, error: bytes) -> bytes:
    name = orjson.dumps(custom_id)
    return b'{"id":"batch_req_%b","custom_id":%b,"response":%b,"error":%b}\n' % (
        request_id.encode(),
        name,
        response,
        error,
    )


# --- which of a listing ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """Which part of a listing: so many, after the one of that id, from the oldest or the newest on."""

    limit: int
    after: str | None = None
    oldest_first: bool = False


def parse_page(query: Mapping[str, str], default: int, most: int) -> Page:
    """Parse a query. Raises InvalidRequestError."""
    limit = read.decimal(query.get("limit", str(default)))
    if limit is None or not 1 <= limit <= most:
        raise InvalidRequestError(f"`limit` must be 1 to {most}", "limit")
    order = read.choice(query, "order", ("asc", "desc"), "desc")
    return Page(limit, query.get("after"), order == "asc")
