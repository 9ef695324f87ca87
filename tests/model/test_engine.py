"""The engines that compute fulfil the same contract as the fake one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import checkpoints, workers

pytestmark = pytest.mark.model

# In a process of its own, as in a replica: an engine binds its threads and sets variables for vLLM.
PROGRAM = """
import asyncio, sys
from deployments.config.load import load_workers
from deployments.plan.plan import Machine, make_plans
from deployments.engine import make_engine
from tests.harness.engine_contract import check_engine
(plan,) = make_plans(load_workers(sys.argv[1]), Machine(1, 0, 1))
engine = make_engine(plan)
asyncio.run(check_engine(engine, engine.start(), 0.99999))
"""


@pytest.mark.parametrize("engine", ["vllm", "sentence-transformers"])
def test_an_engine_fulfils_the_contract(tmp_path: Path, engine: str) -> None:
    """In float32, where batching may change no more than the last digits."""
    file = tmp_path / "minilm.toml"
    text = workers.vllm("minilm", checkpoints.minilm(), 'dtype = "float32"')
    file.write_text(text.replace("[generator]", f'[generator]\nengine = "{engine}"'))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
