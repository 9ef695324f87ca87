"""The key file and the ring: hashed, private, taken up when it changes."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deployments.__main__ import main
from deployments.errors import ConfigError
from deployments.keys.file import hash_of, read_keys
from deployments.keys.ring import FileKeyRing, KeySource, is_loopback, key_source, require_keys


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        """Start anywhere."""
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def keys(file: Path, capsys: pytest.CaptureFixture[str], action: str, *arguments: str) -> str:
    """Run `embedding-cluster keys`; return what it printed."""
    assert main(["keys", action, "--keys", str(file), *arguments]) == 0
    return capsys.readouterr().out.strip()


def test_a_keys_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made, listed, rotated, revoked; its plaintext is shown once, and stored nowhere."""
    file, clock = tmp_path / "keys.json", Clock()
    secret = keys(file, capsys, "create", "search", "--models", "a*", "--requests-per-minute", "60")
    other = keys(file, capsys, "create", "other", "--operator", "--days", "30")
    assert file.stat().st_mode & 0o777 == 0o600
    assert secret not in file.read_text()
    assert secret not in keys(file, capsys, "list")
    ring = FileKeyRing(file, clock)
    found = ring.find(secret.encode())
    assert found is not None
    assert (found.name, found.may_use("abc"), found.may_use("b")) == ("search", True, False)

    fresh = keys(file, capsys, "rotate", "search")
    clock.now += 1
    assert ring.find(fresh.encode()) is not None
    assert ring.find(secret.encode()) is not None  # for an hour
    fresher = keys(file, capsys, "rotate", "search", "--grace", "0")
    clock.now += 1
    assert [ring.find(each.encode()) is not None for each in (secret, fresh, fresher)] == [False, False, True]

    keys(file, capsys, "revoke", "search")
    clock.now += 1
    assert ring.find(fresher.encode()) is None
    assert ring.find(other.encode()) is not None
    assert main(["keys", "revoke", "--keys", str(file), "search"]) == 2
    assert main(["keys", "create", "--keys", str(file), "other"]) == 2
    assert main(["keys", "create", "--keys", str(file), "no spaces"]) == 2


def test_a_file_that_others_may_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start; while serving, the keys stay as they were."""
    file, clock = tmp_path / "keys.json", Clock()
    secret = keys(file, capsys, "create", "search")
    ring = FileKeyRing(file, clock)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(file)
    with pytest.raises(ConfigError):
        key_source(str(file))
    clock.now += 1
    assert ring.find(secret.encode()) is not None
    file.chmod(0o600)
    file.write_text("{")
    clock.now += 1
    assert ring.find(secret.encode()) is not None


def test_keys_outlive_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """While it is gone, a folder or empty they stay as they were, told once; then it counts again."""
    file, clock = tmp_path / "keys.json", Clock()
    secret = keys(file, capsys, "create", "search")
    content = file.read_text()
    ring = FileKeyRing(file, clock)
    file.unlink()
    for _ in range(3):
        clock.now += 1
        assert ring.find(secret.encode()) is not None
        assert ring.find(b"another") is None
    assert len(caplog.records) == 1
    assert "the keys stay as they were" in caplog.text
    with pytest.raises(ConfigError, match="can't be read"):
        key_source(str(file))
    file.mkdir()
    clock.now += 1
    assert ring.find(secret.encode()) is not None
    file.rmdir()
    file.touch(mode=0o600)
    clock.now += 1
    assert ring.find(secret.encode()) is not None
    other = secret.replace(secret[-4:], "else")
    file.write_text(content.replace(hash_of(secret.encode()), hash_of(other.encode())))
    clock.now += 1
    assert ring.find(secret.encode()) is None
    assert ring.find(other.encode()) is not None


def test_an_expired_key_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its last second on, without the file changing."""
    file = tmp_path / "keys.json"
    secret = keys(file, capsys, "create", "search")
    content = json.loads(file.read_text())
    content["keys"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    file.write_text(json.dumps(content))
    assert FileKeyRing(file, Clock()).find(secret.encode()) is None


def test_a_mistake_in_a_file_is_named_and_not_quoted(tmp_path: Path) -> None:
    """Somebody may have written a plaintext into it."""
    file = tmp_path / "keys.json"
    file.write_text('{"keys": [{"name": "a", "sha256": "my-plaintext", "created": "2026-01-01T00:00:00Z"}]}')
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.0\.sha256") as caught:
        read_keys(file)
    assert "my-plaintext" not in caught.value.message


def test_the_environment_may_hold_a_files_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no place for a file; a file that is named goes before."""
    file = tmp_path / "keys.json"
    secret = keys(file, capsys, "create", "search")
    monkeypatch.setenv("EMBEDDING_CLUSTER_KEYS", file.read_text())
    ring = key_source("").ring()
    assert ring is not None
    assert ring.find(secret.encode()) is not None
    assert key_source(str(file)).file
    monkeypatch.setenv("EMBEDDING_CLUSTER_KEYS", "nonsense")
    with pytest.raises(ConfigError, match="EMBEDDING_CLUSTER_KEYS"):
        key_source("")


def test_without_keys_only_this_machine_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    """Unless that is meant."""
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", None):
        assert is_loopback(host)
        require_keys(KeySource(), False, host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", ""):
        with pytest.raises(ConfigError, match="needs keys"):
            require_keys(KeySource(), False, host)
        require_keys(KeySource(), True, host)
        require_keys(KeySource(text="x"), False, host)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "needs keys" in capsys.readouterr().err
