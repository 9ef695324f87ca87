"""schemathesis over the running application: whatever a client sends, the answer is a documented one."""

import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvicorn

from deployments.batches.store import BatchPlace
from deployments.config.load import load_workers
from deployments.config.plan import Machine, make_plans
from deployments.gateway.auth import Access
from deployments.gateway.batches import BatchAccess
from deployments.gateway.ingress import make_app
from deployments.gateway.rates import LocalRates
from deployments.keys import Key, KeyRing, Keys, hash_of
from tests import workers
from tests.app.conftest import LocalHandle, make_serving
from tests.server import free_port, program

pytestmark = pytest.mark.slow
# The name in the documentation's examples.
MODEL = "all-minilm-l6-v2"
SECRET = "secret-of-the-test"
# What a schema can't say makes some well-formed requests impossible: a model's sizes, prompts, vocabulary.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "429"]
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The application with keys on, served by uvicorn in a thread."""
    file = tmp_path / "model.toml"
    file.write_text(
        workers.fake(
            MODEL, "dimension = 16", task='dimensions = [8]\nprompts = {instruction = "{instruction}: "}'
        )
    )
    (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
    now = datetime.now(UTC)
    key = Key(name="test", sha256=hash_of(SECRET.encode()), created=now, operator=True)
    access = Access(KeyRing(Keys(keys=(key,))), LocalRates())
    port = free_port()

    def run() -> None:
        serving = make_serving({plan.name: LocalHandle(plan)}, access.rates)

        async def gather() -> list[bytes]:
            return [serving.metrics.text()]

        stored = BatchPlace(f"{tmp_path}/storage", 3600).open()
        # Whoever runs batches is another process.
        batches = BatchAccess(stored, 1_000_000, lambda: None)
        server.config.app = make_app(serving, gather, access=access, batches=batches)
        server.run()

    server = uvicorn.Server(uvicorn.Config("", port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_every_answer_is_a_documented_one(address: str, tmp_path: Path) -> None:
    """No 5xx, no undocumented status, no other shape; for well and ill formed requests, by all checks."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [program("schemathesis"), "--config-file", str(config), "run", f"{address}/openapi.json"]
    command += ["--checks", "all", "--max-examples", "5", "--seed", "1", "--workers", "1", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--header", f"Authorization: Bearer {SECRET}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
