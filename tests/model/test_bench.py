"""A small case of `make bench`: real servers, real answers, everything that the full run keeps."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rivals
from benchmarks.results import MEMORY, START, Results
from benchmarks.workloads import MIN_COSINE, WORKLOADS

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent.parent


def bench(folder: Path, *arguments: str) -> str:
    """Run the benchmark on its smallest case and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.bench", "--folder", str(folder), "--name", "small"]
    return subprocess.run([*command, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_ours_and_the_engine_on_one_workload(tmp_path: Path) -> None:
    """Both are measured and checked; raw results, table and plot are kept; the page stays as it is."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    names = [contestant.name for contestant in rivals.CONTESTANTS]
    numbers = ",".join(str(names.index(name)) for name in (rivals.US, rivals.ENGINE))
    printed = bench(tmp_path, "--rounds", "1", "--seconds", "1", "--contestants", numbers, "--workloads", "1")
    results = Results.load(tmp_path / "small.json")
    for name in (rivals.US, rivals.ENGINE):
        assert {v.workload for v in results.values if v.contestant == name} == {
            START,
            WORKLOADS[1].name,
            MEMORY,
        }
    measured = [v for v in results.values if v.workload == WORKLOADS[1].name]
    assert all(v.value > 0 and v.checked > 0 and v.worst_cosine >= MIN_COSINE for v in measured)
    assert f"| {WORKLOADS[1].name} | {rivals.ENGINE} | ≥ 0.5 |" in printed
    assert (tmp_path / "small.md").read_text() == printed
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    assert bench(tmp_path, "--show") == printed
    assert (ROOT / "benchmarks" / "README.md").read_text() == page
