"""Batches on a real Ray cluster, with OpenAI's own client: killed processes, a killed server, cancelling."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from openai.types import Batch
from openai.types.batch_request_counts import BatchRequestCounts

from tests.harness import workers
from tests.harness.fake import expected
from tests.harness.server import Server, serve, wait_for

pytestmark = pytest.mark.cluster
LINES, DIMENSION = 5000, 16
# Some 110,000 tokens on two replicas: half a minute, in which a killed ingress comes back.
MODEL = f"dimension = {DIMENSION}, call_seconds = 0.005, token_seconds = 0.0006"
SECONDS = 120


def line(number: int, **changes: Any) -> bytes:
    """Return a line of an input file."""
    body = {"model": "m", "input": f"the text number {number:04d}", "encoding_format": "float"}
    request = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(request | changes).encode()


# What is wrong with ten of the lines, by their number: the line, its custom_id, its error's code.
BAD: dict[int, tuple[bytes, str | None, str]] = {
    0: (b'{"custom_id": "line-0", "method"', None, "invalid_json_line"),
    7: (b"[]", None, "invalid_json_line"),
    499: (line(499, custom_id=None), None, "missing_required_parameter"),
    500: (line(500, custom_id="line-3"), "line-3", "duplicate_custom_id"),
    1234: (line(1234, method="GET"), "line-1234", "invalid_method"),
    2000: (line(2000, url="/v1/chat/completions"), "line-2000", "invalid_url"),
    3000: (line(3000, body=None), "line-3000", "missing_required_parameter"),
    3001: (line(3001, body={"model": "none", "input": "x"}), "line-3001", "model_not_found"),
    4000: (line(4000, body={"model": "m", "input": [1, "x"]}), "line-4000", "invalid_request"),
    4999: (line(4999, body={"model": "m", "input": "x" * 1000}), "line-4999", "context_length_exceeded"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worker files, of which one never gets a replica, and where files and batches outlive a server."""
    folder = tmp_path_factory.mktemp("batches")
    (folder / "workers").mkdir()
    (folder / "workers" / "m.toml").write_text(workers.fake("m", MODEL, "[deployment]\nnum_replicas = 2"))
    none = "[deployment.autoscaling]\nmin_replicas = 0\n[deployment.resources]\nnowhere = 1"
    (folder / "workers" / "away.toml").write_text(workers.fake("away", more=none))
    return folder


@contextlib.contextmanager
def started(place: Path) -> Iterator[tuple[Server, openai.OpenAI]]:
    """Serve over the same folder, with two ingress replicas."""
    data = {"XDG_DATA_HOME": str(place / "data")}
    with serve(place / "workers", place, data, ingress_replicas=2) as server:
        yield server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=5)


def create(client: openai.OpenAI, content: bytes) -> Any:
    """Upload a file and make a batch of it."""
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"job": "test"}
    )


def wait_until_completed(client: openai.OpenAI, batch: Any, lines: int) -> int:
    """Wait until so many lines are, and return how many that are."""
    counts = lambda: counts_of(client.batches.retrieve(batch.id)).completed  # noqa: E731
    wait_for(lambda: counts() >= lines, SECONDS, lambda: str(client.batches.retrieve(batch.id)))
    return int(counts())


def counts_of(batch: Batch) -> BatchRequestCounts:
    """Return a batch's counts, which ours always has."""
    assert batch.request_counts is not None
    return batch.request_counts


def read(client: openai.OpenAI, name: str | None) -> list[dict[str, Any]]:
    """Return a file's lines."""
    assert name is not None
    return [json.loads(text) for text in client.files.content(name).text.splitlines()]


def kill(processes: list[psutil.Process]) -> None:
    """End processes at once."""
    assert processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_batch_survives_its_runner_the_ingress_and_the_whole_server(place: Path) -> None:
    """4,990 right results and ten reasons, no line twice or missing."""
    content = b"\n".join(BAD[n][0] if n in BAD else line(n) for n in range(LINES))
    with started(place) as (server, client):
        batch = create(client, content)
        done = wait_until_completed(client, batch, 1)
        kill(server.titled("ServeReplica:default:batches") + server.titled("ServeReplica:default:ingress"))
        done = wait_until_completed(client, batch, done + 1)
        assert done < LINES - len(BAD), "it has ended too soon for this test"
        private = server.titled("ServeReplica:default:m")[0].environ()["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]
        kill(server.processes())
        shutil.rmtree(Path(private).parent)
    with started(place) as (server, client):
        assert counts_of(client.batches.retrieve(batch.id)).completed >= done
        wait_until_completed(client, batch, LINES - len(BAD))
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", SECONDS, "its end")
        ended = client.batches.retrieve(batch.id)
        counts = counts_of(ended)
        assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - len(BAD), len(BAD))
        output, errors = read(client, ended.output_file_id), read(client, ended.error_file_id)
        good = [n for n in range(LINES) if n not in BAD]
        assert [each["custom_id"] for each in output] == [f"line-{n}" for n in good]
        got = [each["response"]["body"]["data"][0]["embedding"] for each in output]
        texts = [f"the text number {n:04d}" for n in good]
        right = expected(texts, DIMENSION)
        assert np.array_equal(np.array(got, np.float32), right)
        told = Counter((each["custom_id"], each["error"]["code"]) for each in errors)
        assert told == Counter((custom_id, code) for _, custom_id, code in BAD.values())
        assert len({each["id"] for each in output + errors}) == LINES
        counted = 'embedding_batch_lines_total{model="m",outcome="ok"}'
        assert counted in httpx.get(f"{server.url}/metrics", timeout=30).text
        # More batches than run at once stand, since their model has no replica; those of others go on.
        body = {"model": "away", "input": "x"}
        standing = [create(client, line(0, body=body)) for _ in range(6)]
        wait_for(lambda: client.batches.retrieve(standing[3].id).status == "in_progress", SECONDS, "four")
        # One that is cancelled keeps what is done.
        batch = create(client, b"\n".join(map(line, range(LINES))))
        wait_until_completed(client, batch, 1)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "cancelled", SECONDS, "its end")
        cancelled = client.batches.retrieve(batch.id)
        assert 0 < counts_of(cancelled).completed < LINES
        assert len(read(client, cancelled.output_file_id)) == counts_of(cancelled).completed
        shown = {each.id: each.status for each in client.batches.list()}
        assert list(shown) == [cancelled.id, *(each.id for each in reversed(standing)), ended.id]
        assert {shown[each.id] for each in standing} <= {"validating", "in_progress"}
