"""The ring of keys: where they are, and which one a client sent."""

import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deployments.errors import ConfigError
from deployments.keys.file import KEYS_VARIABLE, Key, Keys, hash_of, read_keys

logger = logging.getLogger("ray.serve")

# Longer than any key; what is longer isn't even hashed.
MAX_SECRET_LENGTH = 512
# How long a revoked key may still be accepted, at most.
RELOAD_SECONDS = 0.5


@dataclass(frozen=True)
class KeySource:
    """Where the keys are: in a file, or in the text of one, which an environment variable held."""

    file: str = ""
    text: str = ""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.file or self.text)

    def ring(self) -> "KeyRing | None":
        """Return the ring of these keys, None where there are none. Raises ConfigError."""
        if self.file:
            return FileKeyRing(Path(self.file))
        return KeyRing(Keys.parse(self.text, KEYS_VARIABLE)) if self.text else None


def key_source(file: str) -> KeySource:
    """Return the source that a path or the environment names, having read it once. Raises ConfigError."""
    source = (
        KeySource(str(Path(file).resolve())) if file else KeySource(text=os.environ.get(KEYS_VARIABLE, ""))
    )
    source.ring()
    return source


def require_keys(source: KeySource, insecure: bool, host: str | None) -> None:
    """Raise ConfigError where other machines could reach an address that asks for no key."""
    if not (source or insecure or is_loopback(host)):
        raise ConfigError(
            f"{host}: other machines can reach this address, so it needs keys;"
            f" set keys (or {KEYS_VARIABLE}), or insecure if that is meant"
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address; without one nothing listens."""
    try:
        return host in (None, "localhost") or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


class KeyRing:
    """Finds the key that a client sent: one lookup by its hash."""

    def __init__(self, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        """Accept these keys."""
        self._clock = clock
        self._by_hash: dict[str, Key] = {}
        self._by_name: dict[str, Key] = {}
        self.take(keys)

    def take(self, keys: Keys) -> None:
        """Accept these keys from now on, and no others."""
        self._by_hash = {key.sha256: key for key in keys.keys}
        self._by_name = {key.name: key for key in sorted(keys.keys, key=lambda key: key.created)}

    def find(self, secret: bytes) -> Key | None:
        """Return the key of that plaintext, if it is valid now."""
        if not secret or len(secret) > MAX_SECRET_LENGTH:
            return None
        self.refresh()
        found = hash_of(secret)
        key = self._by_hash.get(found)
        # The lookup compares hashes, which tell nothing of a key; this comparison takes the same time always.
        if key is None or not hmac.compare_digest(key.sha256, found):
            return None
        return None if key.expires is not None and key.is_expired(datetime.now(UTC)) else key

    def named(self, name: str) -> Key | None:
        """Return the latest key of a name, if it is valid now: work goes on without the plaintext."""
        self.refresh()
        key = self._by_name.get(name)
        return None if key is None or key.is_expired(datetime.now(UTC)) else key

    def valid(self) -> list[Key]:
        """Return the keys that are valid now, by name; of several of a name the latest."""
        self.refresh()
        now = datetime.now(UTC)
        return [key for _, key in sorted(self._by_name.items()) if not key.is_expired(now)]

    def refresh(self) -> None:
        """Look whether there are other keys by now; nothing changes here."""


class FileKeyRing(KeyRing):
    """The keys of a file, read again when it has changed."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises ConfigError."""
        self._path = path
        self._seen = _stamp(path)
        super().__init__(read_keys(path), clock)
        self._next_look = clock() + RELOAD_SECONDS

    def refresh(self) -> None:
        """Read the file again where it has changed; keep the keys that there are while it holds a mistake."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + RELOAD_SECONDS
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self.take(read_keys(self._path))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error.message)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode
