"""Client keys: the file that holds them, hashed.

A key is 256 random bits, so that its SHA-256 tells nothing of it and needs no salt. Its plaintext is shown
once, when it is made, and is stored nowhere.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.durable import replacing
from deployments.errors import ConfigError

PREFIX = "ec-"  # so that scanners for leaked secrets can know one
SECRET_BYTES = 32
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
        with replacing(path) as file:
            file.write(f"{text}\n".encode())


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
