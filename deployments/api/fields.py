"""Fields of a JSON body, checked by hand: errors name the field, and never quote what it holds."""

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
from pydantic import Field

from deployments.errors import InvalidRequestError, MissingCapabilityError

T = TypeVar("T")
Fields = Mapping[str, Any]
Body = bytes | bytearray | memoryview
PIECE_BYTES = 2**18
# Where the zeros are among the first bytes of JSON, whose first character is ASCII.
ZEROS_UTF32 = re.compile(rb"[^\0]\0\0\0|\0\0\0[^\0]")
ZEROS_UTF16 = re.compile(rb"[^\0]\0|\0[^\0]")

# The same for the OpenAPI document. The decoder makes larger numbers floats, so they are no integers here.
MOST = 2**64 - 1
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
# As gateways write it.
Written = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]
TokenId = Annotated[int, Field(ge=0, le=MOST)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Inputs = (
    Text
    | Annotated[list[Text], Field(min_length=1)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1)]
)


def count_values(body: Body, few: int = 0) -> int:
    """Return how many values a JSON body holds at most, without making any of them.

    In pieces, by loops that let other threads run: a parser keeps them all out until it is through. Where
    there are `few` commas and brackets at most, what stands in strings is counted too: that costs a tenth.
    """
    pieces = (
        np.frombuffer(body, np.uint8, min(PIECE_BYTES, len(body) - start), start)
        for start in range(0, len(body), PIECE_BYTES)
    )
    if (count := 1 + sum(int(np.count_nonzero(_begins(raw))) for raw in pieces)) <= few:
        return count
    count, inside, rest = 1, False, b""
    for start in range(0, len(body), PIECE_BYTES):
        piece = rest + body[start : start + PIECE_BYTES]
        # What a last lone backslash escapes stands in the next piece.
        lone = (len(piece) - len(piece.rstrip(b"\\"))) % 2
        piece, rest = piece[: len(piece) - lone], piece[len(piece) - lone :]
        raw = np.frombuffer(piece.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        if not len(raw):
            continue
        within = np.logical_xor.accumulate(raw == ord('"')) ^ inside
        count += int(np.count_nonzero(_begins(raw) & ~within))
        inside = bool(within[-1])
    return count


def _begins(raw: np.ndarray) -> np.ndarray:
    """Return where a value may begin: bool, as long as the bytes."""
    found: np.ndarray = (raw == ord(",")) | (raw == ord("[")) | (raw == ord("{"))
    return found


def read_object(body: Body) -> dict[str, Any]:
    """Return the body's fields; null means absent. Raises InvalidRequestError."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        fields = _read_marked(body, error)
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object", "body")
    return present(fields)


def _read_marked(body: Body, error: orjson.JSONDecodeError) -> Any:
    """Return what stands behind a byte order mark. Raises InvalidRequestError that says what is wrong."""
    if body[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8:
        try:
            return orjson.loads(memoryview(body)[len(codecs.BOM_UTF8) :])
        except orjson.JSONDecodeError as inner:
            error = inner
    if (encoding := _encoding(body)) is not None:
        raise InvalidRequestError(f"the body is in {encoding}; JSON is sent in UTF-8", "body")
    # The decoder's own message quotes nothing of the input; line and column help a person.
    raise InvalidRequestError(
        f"the body isn't valid JSON: {error.msg} (line {error.lineno}, column {error.colno})", "body"
    )


def _encoding(body: Body) -> str | None:
    """Return which encoding a body is in, as RFC 4627 tells them apart; None where it is UTF-8."""
    start = bytes(body[:4])
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or ZEROS_UTF32.match(start):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or ZEROS_UTF16.match(start):
        return "UTF-16"
    try:
        codecs.utf_8_decode(body, "strict", True)
    except UnicodeDecodeError as error:
        return f"another encoding (byte {error.start} isn't UTF-8)"
    return None


def present(fields: Fields) -> dict[str, Any]:
    """Return the fields that aren't null."""
    return {name: value for name, value in fields.items() if value is not None}


def string(fields: Fields, name: str) -> str | None:
    """Return a text that isn't empty, or None where it is absent."""
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidRequestError(f"`{name}` must be a string that isn't empty", name)
    return value


def maybe_string(fields: Fields, name: str) -> str:
    """Return a text; empty where it is absent, as gateways write that."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise InvalidRequestError(f"`{name}` must be a string", name)
    return value


def agreed(**given: T) -> T | None:
    """Return what several fields say of one thing, None where there is no field. Raises where they differ."""
    first, wanted = next(iter(given.items()), ("", None))
    for name, value in given.items():
        if value != wanted:
            raise InvalidRequestError(f"`{first}` and `{name}` ask for different things", name)
    return wanted


def model(fields: Fields) -> str | None:
    """Return the name of the model, or None where it is absent or empty: there may be one alone."""
    return maybe_string(fields, "model") or None


def required_string(fields: Fields, name: str) -> str:
    """Return a text that isn't empty."""
    if (value := string(fields, name)) is None:
        raise InvalidRequestError(f"`{name}` is missing", name)
    return value


def positive(fields: Fields, name: str) -> int | None:
    """Return a number above 0, or None where it is absent."""
    value = fields.get(name)
    # bool is a subclass of int, so the exact type is asked for.
    if value is not None and (type(value) is not int or value < 1):
        raise InvalidRequestError(f"`{name}` must be a positive integer", name)
    return value


def whole(fields: Fields, name: str) -> int | None:
    """Return a number above 0 as gateways write it: 384, 384.0 or "384"; None where it is absent."""
    value = fields.get(name)
    if type(value) is float and value.is_integer() and value <= MOST:
        value = int(value)
    elif isinstance(value, str):
        value = decimal(value)
    if value is None and name in fields:
        value = 0
    return positive({name: value}, name)


def decimal(text: str) -> int | None:
    """Return a number that a query or a form holds, of up to nine digits; None where it is none."""
    return int(text) if re.fullmatch("0|[1-9][0-9]{0,8}", text) else None


def flag(fields: Fields, name: str) -> bool | None:
    """Return true or false, or None where it is absent."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"`{name}` must be true or false", name)
    return value


def choice(fields: Fields, name: str, choices: Sequence[str], default: str) -> str:
    """Return one of the choices."""
    value = fields.get(name, default)
    if value not in choices or not isinstance(value, str):
        known = ", ".join(f"`{each}`" for each in choices)
        raise InvalidRequestError(f"`{name}` must be one of {known}", name)
    return value


def strings(fields: Fields, name: str) -> list[str]:
    """Return a list of texts, none of them empty; an absent field is an empty list."""
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise InvalidRequestError(f"`{name}` must be a list of strings", name)
    check_texts(value, name)
    return value


def tags(fields: Fields) -> frozenset[str]:
    """Return the tags that a worker must have to serve the request."""
    return frozenset(strings(fields, "tags"))


def not_empty(value: Any, name: str) -> list[Any]:
    """Return a list with something in it."""
    if not isinstance(value, list):
        raise InvalidRequestError(f"`{name}` must be a list", name)
    if not value:
        raise InvalidRequestError(f"`{name}` must not be empty", name)
    return value


def check_texts(texts: list[Any], name: str) -> None:
    """Raise InvalidRequestError unless each is a text that isn't empty."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequestError(f"`{name}[{index}]` must be a string", name)
        if not text:
            raise InvalidRequestError(f"`{name}[{index}]` must not be empty", name)


def token_ids(ids: Any, name: str, param: str) -> list[int]:
    """Return a list of token ids with something in it; `name` is where it stands, `param` the field."""
    if not isinstance(ids, list):
        raise InvalidRequestError(f"`{name}` must be a list of token ids", param)
    if not ids:
        raise InvalidRequestError(f"`{name}` must not be empty", param)
    # bool is a subclass of int, so the exact type is asked for.
    if any(type(token) is not int for token in ids):
        raise InvalidRequestError(f"`{name}` must hold token ids, which are integers", param)
    if min(ids) < 0:
        raise InvalidRequestError(f"`{name}` holds a negative token id", param)
    return ids


def text(fields: Fields, name: str) -> str:
    """Return a text, which may be empty."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"`{name}` must be a string", name)
    return value


def few_or_no_ids(fields: Fields, name: str) -> list[int]:
    """Return a list of token ids, which may be empty."""
    if name not in fields:
        raise InvalidRequestError(f"`{name}` is missing", name)
    return [] if fields[name] == [] else token_ids(fields[name], name, name)


def texts_or_ids(value: Any, name: str) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Tell the four shapes apart: a text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"`{name}` must be a string, a list of strings, a list of token ids, or a list of those", name
        )
    not_empty(value, name)
    if isinstance(value[0], str | list) and {str, list} <= set(map(type, value)):
        raise InvalidRequestError(f"`{name}` can't hold both texts and token ids", name)
    if isinstance(value[0], str):
        check_texts(value, name)
        return value, ()
    if isinstance(value[0], list):
        return (), [token_ids(ids, f"{name}[{index}]", name) for index, ids in enumerate(value)]
    return (), [token_ids(value, name, name)]


def refuse(fields: Fields, name: str) -> None:
    """Raise MissingCapabilityError where the request asks for more than 0 of what no model here can do."""
    value = fields.get(name, 0)
    if isinstance(value, bool) or value != 0:
        raise MissingCapabilityError(f"no model here supports `{name}`", name)
