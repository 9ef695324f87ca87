"""A container's CPU quota counts wherever cores are counted."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
import deployments
from deployments import machine
from deployments.app import cluster_machine
from deployments.engine.cores import CoreClaim, sharers
from deployments.errors import EngineStartError
from deployments.machine import cores_here, cpu_quota, own_cores


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/pods/not-seen-in-here\n", {"cpu.max": "300000 100000"}, 3.0),
        ("3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000"}, 4.0),
        ("3:cpu:/host/path\n", {"cpu/cpu.cfs_quota_us": "-1"}, math.inf),
        ("3:cpu:/host/path\n", {"cpu/cpu.cfs_quota_us": "250000"}, 2.5),
        ("4:memory:/x\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "what is this"}, math.inf),
        (None, {"cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_a_quota_is_read_in_both_versions(
    tmp_path: Path, membership: str | None, files: dict[str, str], quota: float
) -> None:
    """The least of all groups around the process; what can't be read says nothing."""
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        if "quota" in name:
            file.with_name("cpu.cfs_period_us").write_text("100000\n")
    if membership is not None:
        (tmp_path / "self").write_text(membership)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "self") == quota


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (2.0, 2), (2.9, 2), (64, 8), (math.inf, 8)])
def test_a_quota_counts_wherever_cores_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: float, cores: int
) -> None:
    """In plans, for the cores that engines claim, for how many share one; a part of a core is none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert cores_here() == cores
    assert cluster_machine([]).cpus == cores
    assert [sharers(cpus) for cpus in (cores, cores + 1, 2 * cores)] == [1, 2, 2]
    assert CoreClaim(cores, tmp_path).claim(0) == own_cores()
    with pytest.raises(EngineStartError) as told:
        CoreClaim(cores + 1, tmp_path).claim(0)
    assert told.value.message == (
        f"the worker asks for {cores + 1} cores and its node has {cores}; lower deployment.num_cpus"
    )


def test_containers_of_one_machine_dont_all_take_its_first_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins somewhere else; without a quota all cores are its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: 4.0)
    found = set()
    for name in ("pod-a", "pod-b", "pod-c"):
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        assert len(own_cores()) == 4
        found.add(tuple(own_cores()))
    assert len(found) == 3
    monkeypatch.setattr(machine, "cpu_quota", lambda: math.inf)
    assert own_cores() == list(range(64))


def test_cores_are_counted_in_one_place() -> None:
    """Nowhere else is the kernel asked, which knows of no quota."""
    counters = {"cpu_count", "sched_getaffinity", "process_cpu_count"}
    for package in (deployments, benchmarks):
        for path in Path(package.__path__[0]).rglob("*.py"):
            names = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert not names & counters or path.name == "machine.py", path


LEFT = """
import psutil
from deployments.machine import give_back_large_blocks
if {gives_back}:
    give_back_large_blocks()
bytearray(30 * 2**20)  # from now on glibc by itself keeps all that is smaller
before = psutil.Process().memory_info().rss
blocks = [bytearray(b"x") * 2**21 for _ in range(100)]
del blocks[:-1]
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.parametrize(("gives_back", "least", "most"), [(True, 1, 20), (False, 100, 300)])
def test_what_bodies_took_goes_back_to_the_system(gives_back: bool, least: int, most: int) -> None:
    """Of 200 MiB in blocks, all but the last one, though that one is in use; not so by itself."""
    code = LEFT.format(gives_back=gives_back)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert least <= int(result.stdout) <= most
