"""Cores are owned: by one claim at a time, until the claim or its process ends."""

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deployments.engine import choice
from deployments.engine.batch import TokenBatch
from deployments.engine.cores import CoreClaim, sharers
from deployments.engine.thread import Way
from deployments.errors import EngineStartError
from deployments.machine import own_cores

CORES = own_cores()


def hold(folder: Path, connection: Connection) -> None:
    """Claim one core in a process of its own and hold it until killed."""
    connection.send(CoreClaim(1, folder).claim(wait_seconds=0))
    connection.recv()


def test_two_claims_never_share_a_core(tmp_path: Path) -> None:
    """Each gets another one, and there are no more than the machine has."""
    claims = [CoreClaim(1, tmp_path) for _ in CORES]
    assert sorted(core for claim in claims for core in claim.claim(0)) == CORES
    with pytest.raises(EngineStartError, match="other replicas"):
        CoreClaim(1, tmp_path).claim(wait_seconds=0)
    claims[0].release()
    assert len(CoreClaim(1, tmp_path).claim(wait_seconds=0)) == 1


def test_cores_are_shared_as_far_as_ray_counts_more_cpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each claim gets different cores, the least shared ones first; one too many is still refused."""
    assert [sharers(cpus) for cpus in (0, 1, len(CORES), len(CORES) + 1, 2 * len(CORES))] == [1, 1, 1, 2, 2]
    claims = [CoreClaim(1, tmp_path, shared_by=2) for _ in CORES]
    assert sorted(core for claim in claims for core in claim.claim(0)) == CORES
    assert not caplog.records
    assert CoreClaim(len(CORES), tmp_path, shared_by=2).claim(0) == CORES
    assert len(caplog.records) == len(CORES)
    with pytest.raises(EngineStartError, match="other replicas"):
        CoreClaim(1, tmp_path, shared_by=2).claim(0)
    claims[0].release()
    assert len(CoreClaim(1, tmp_path, shared_by=2).claim(0)) == 1


@pytest.mark.parametrize("squatter", ["a link", "a folder for all", "a file"])
def test_locks_are_kept_in_this_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squatter: str
) -> None:
    """Where somebody was there first, it is another one; and all claims keep it there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    public = tmp_path / "tmp"
    public.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    place = public / f"embedding-cluster-cores-{os.getuid()}"
    if squatter == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    elif squatter == "a folder for all":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.touch()
    claims = [CoreClaim(1) for _ in CORES]
    assert sorted(core for claim in claims for core in claim.claim(0)) == CORES
    with pytest.raises(EngineStartError, match="other replicas"):
        CoreClaim(1).claim(wait_seconds=0)
    assert len(list((tmp_path / "home").rglob("*.lock"))) == len(CORES)
    assert not list(tmp_path.glob("t*/**/*.lock"))


def test_more_cores_than_the_node_has_are_refused_at_once(tmp_path: Path) -> None:
    """The message says how many there are."""
    with pytest.raises(EngineStartError, match=f"its node has {len(CORES)}"):
        CoreClaim(len(CORES) + 1, tmp_path).claim()


def test_a_killed_holder_loses_its_cores(tmp_path: Path) -> None:
    """SIGKILL leaves no lock behind."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path, theirs))
    holder.start()
    (held,) = ours.recv()
    rest = CoreClaim(len(CORES) - 1, tmp_path).claim(0) if len(CORES) > 1 else []
    assert held not in rest
    with pytest.raises(EngineStartError):
        CoreClaim(1, tmp_path).claim(wait_seconds=0)
    holder.kill()
    holder.join()
    assert CoreClaim(1, tmp_path).claim(wait_seconds=60) == [held]


@pytest.mark.parametrize(("speed", "wanted"), [(80_000, [1]), (20_000, [1, 4])])
def test_one_thread_is_left_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, speed: float, wanted: list[int]
) -> None:
    """Tokens a second of one thread; a model that has more to compute gets all that it had."""
    now, asked = [0.0], [4]

    class Engine:
        vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cpu"))

        def collective_rpc(self, _: str, args: tuple[int]) -> list[int]:
            asked.extend(args)
            return [asked[-2]]

    class Timed(Way):
        def embed(self, batch: TokenBatch) -> np.ndarray:
            now[0] += batch.tokens / (speed * asked[-1])
            return np.zeros((len(batch), 1), np.float32)

    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    said = choice.choose_threads(Engine(), Timed(), TokenBatch.of([[1] * 1000]))
    assert asked[1:] == wanted
    assert bool(said) == (wanted == [1])
