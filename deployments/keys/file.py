"""Client keys: the file that holds them, hashed, and the ring that finds one.

A key is 256 random bits, so that its SHA-256 tells nothing of it and needs no salt. Its plaintext is shown
once, when it is made, and is stored nowhere.
"""

import contextlib
import fcntl
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import ConfigError

logger = logging.getLogger("ray.serve")

PREFIX = "ec-"  # so that scanners for leaked secrets can know one
SECRET_BYTES = 32
# Longer than any key; what is longer isn't even hashed.
MAX_SECRET_LENGTH = 512
# How long a revoked key may still be accepted, at most.
RELOAD_SECONDS = 0.5
# Holds the text of a key file, where there is no place for a file.
KEYS_VARIABLE = "EMBEDDING_CLUSTER_KEYS"
OTHERS = 0o077  # group's and others' bits of a file's mode

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PerMinute = Annotated[int, Field(ge=1)]


class Key(BaseModel):
    """A key, without its plaintext. While one is rotated, two of the same name are accepted.

    `models` are globs over public model names; absent limits are none. An `operator` may read the metrics of
    all. `name` is the key's label in usage and metrics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    sha256: Hash
    models: tuple[str, ...] = ("*",)
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    operator: bool = False
    created: datetime
    expires: datetime | None = None

    def may_use(self, model: str) -> bool:
        """Whether one of its globs fits a model's public name."""
        return any(fnmatchcase(model, glob) for glob in self.models)

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now


class Keys(BaseModel):
    """What a key file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @classmethod
    def parse(cls, text: str, source: str) -> "Keys":
        """Read a file's text. Raises ConfigError that names `source` and quotes nothing."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = [
                f"{source}: {'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']}"
                for detail in error.errors(include_input=False, include_url=False)
            ]
            raise ConfigError("\n".join(lines)) from None


def hash_of(secret: bytes) -> str:
    """Return what is stored of a key."""
    return hashlib.sha256(secret).hexdigest()


# --- the file --------------------------------------------------------------------------------------


def read_keys(path: Path) -> Keys:
    """Read a key file. Raises ConfigError where it can't be read, or others than its owner may read it."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from None
    if mode & OTHERS:
        raise ConfigError(f"{path}: mode {mode:04o} lets others at the keys; run: chmod 600 {path}")
    return Keys.parse(text, str(path))


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """Give the keys of a file to be changed, and put the new file in its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_keys(path).keys) if path.exists() else []
        yield keys
        text = Keys(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600 from the start
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)


def create_key(path: Path, key: Callable[[str], Key]) -> str:
    """Add the key that `key` makes of a hash; return the plaintext.

    Raises ConfigError where the name is taken.
    """
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    made = key(hash_of(secret.encode()))
    with _changing(path) as keys:
        if any(other.name == made.name for other in keys):
            raise ConfigError(f"{path}: there is a key `{made.name}` already; rotate or revoke it")
        keys.append(made)
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out, at once. Raises ConfigError where there is none of that name."""
    with _changing(path) as keys:
        _named(path, keys, name)
        keys[:] = [key for key in keys if key.name != name]


def rotate_key(path: Path, name: str, grace: timedelta) -> str:
    """Give a key a new plaintext, and return it; the old one is accepted for `grace` longer."""
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    now = datetime.now(UTC)
    with _changing(path) as keys:
        old = _named(path, keys, name)
        fresh = old.model_copy(update={"sha256": hash_of(secret.encode()), "created": now})
        ends = min(now + grace, old.expires) if old.expires else now + grace
        # Only the latest of them lives on: rotating twice ends the first.
        keys[:] = [key for key in keys if key.name != name]
        keys += [old.model_copy(update={"expires": ends}), fresh]
    return secret


def _named(path: Path, keys: list[Key], name: str) -> Key:
    """Return the latest key of a name."""
    found = [key for key in keys if key.name == name]
    if not found:
        raise ConfigError(f"{path}: there is no key `{name}`")
    return max(found, key=lambda key: key.created)


# --- the ring --------------------------------------------------------------------------------------


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
