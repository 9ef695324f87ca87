"""`multipart/form-data` with one file in it, which streams on as it arrives."""

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.errors import InvalidRequestError

# It warns of each malformed form, with some of what is in it; whoever sent that is told.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

FILE = "file"
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
MAX_FILENAME = 255
CONTENT_TYPE = b"multipart/form-data"


@dataclass
class _Part:
    """A part of the form: its name, the file's name where it is one, its text where it isn't."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    text: bytearray = field(default_factory=bytearray)


class Upload:
    """A form: `fields` and `filename` are known once `content` has been read to its end."""

    def __init__(self, content_type: str) -> None:
        """Read the header. Raises InvalidRequestError where the body can't be a form."""
        kind, options = parse_options_header(content_type)
        if kind != CONTENT_TYPE or not options.get(b"boundary"):
            raise InvalidRequestError("the body must be multipart/form-data", "content-type")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._part = _Part()
        self._header = bytearray()
        self._value = bytearray()
        self._pieces: list[bytes] = []
        self._ended = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        except FormParserError:
            raise InvalidRequestError("the form's boundary is too long", "content-type") from None

    async def content(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the file's content. Raises InvalidRequestError where the form is malformed or has no file."""
        async for chunk in chunks:
            try:
                self._parser.write(chunk)
            except FormParserError:
                raise InvalidRequestError("the body isn't a valid form", "body") from None
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield b"".join(pieces)
        if not self._ended:
            raise InvalidRequestError("the body isn't a valid form: its end is missing", "body")
        if self.filename is None:
            raise InvalidRequestError("`file` is missing", FILE)

    def _begin_part(self) -> None:
        self._part = _Part()

    def _end_header(self) -> None:
        self._part.headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part.name != FILE:
            return
        if self.filename is not None:
            raise InvalidRequestError("there may be one `file`", FILE)
        # As it is shown and never used as a path.
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        self._part.filename = self.filename = name[:MAX_FILENAME] or FILE

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is not None:
            self._pieces.append(data[start:end])
            return
        self._part.text += data[start:end]
        if len(self._part.text) > MAX_FIELD_BYTES:
            raise InvalidRequestError("a field of the form is too long", "body")

    def _end_part(self) -> None:
        if self._part.filename is None:
            self.fields[self._part.name] = self._part.text.decode("utf-8", "replace")
            if len(self.fields) > MAX_FIELDS:
                raise InvalidRequestError("the form has too many fields", "body")

    def _end(self) -> None:
        self._ended = True
