"""The page's files → answers. They are read and compressed once, when the first is asked for.

Nothing of a request stands in an answer, and no answer names another host.
"""

import functools
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from deployments.errors import RouteNotFoundError

FOLDER = Path(__file__).parent / "assets"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE, WELCOME = "index.html", "welcome.html"
# Scripts, styles and data come from this server alone, no form leaves the page, and no other page frames it.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # Asked again each time, and answered with 304: a new version is there at once, and whole.
    "cache-control": "no-cache",
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class Asset:
    """A file, as it is and compressed."""

    content: bytes
    compressed: bytes
    media_type: str
    tag: str

    def answer(self, request: Request) -> Response:
        """Return it, or that the one which the browser has is still the same."""
        headers = {**HEADERS, "etag": self.tag}
        if self.tag in map(str.strip, request.headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.content, 200, headers, self.media_type)
        headers["content-encoding"] = "gzip"
        return Response(self.compressed, 200, headers, self.media_type)


@functools.cache
def assets() -> Mapping[str, Asset]:
    """Return all files by their paths within the folder; licences are none of the page's."""
    found = {}
    for file in sorted(FOLDER.rglob("*")):
        if file.suffix in TYPES:
            content = file.read_bytes()
            tag = f'W/"{hashlib.sha256(content).hexdigest()[:16]}"'
            compressed = gzip.compress(content, mtime=0)
            name = file.relative_to(FOLDER).as_posix()
            found[name] = Asset(content, compressed, TYPES[file.suffix], tag)
    return found


def asset(name: str) -> Asset:
    """Return a file of the page. Raises RouteNotFoundError."""
    found = assets().get(name)
    if found is None:
        raise RouteNotFoundError("the page has no file of that name")
    return found
