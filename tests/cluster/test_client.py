"""`EmbeddingClient` and `embedding-cluster embed` on a real cluster: driver, task, actor, Ray Data, kills."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import ray
from ray import serve

from benchmarks.batch import Site, kill_job, site
from deployments.app import BuildArguments, build
from deployments.client import EmbeddingClient, embed_dataset
from deployments.errors import ContextLengthError, EngineError, InvalidRequestError, ModelNotFoundError
from tests.harness import workers
from tests.harness.fake import expected
from tests.harness.jobs import environ
from tests.harness.server import program

pytestmark = pytest.mark.cluster
TEXTS = [f"text number {number}" for number in range(3000)]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two nodes with a replica of `m` on each; this process joins them as a driver.

    `narrow` has a single one that little may wait for, `second` one on the second node, which fails on `!`.
    """
    limits = "[limits]\nmax_outstanding_tokens = 500"
    task = 'prompts = {query = "find: "}'
    second = "[deployment.resources]\nsecond = 0.1"
    more = {
        "narrow": workers.fake("narrow", "call_seconds = 0.01", limits, task),
        "second": workers.fake("second", "error_token = 0", second),
    }
    with site(tmp_path_factory.mktemp("client"), more) as where:
        ray.init(address=where.address, log_to_driver=False)
        try:
            yield where
        finally:
            ray.shutdown()


def test_a_driver_embeds(where: Site) -> None:
    """In order, whatever is asked for, with what the model is."""
    client = EmbeddingClient("m")
    vectors = client.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected(TEXTS))
    assert np.array_equal(np.concatenate(list(client.stream(iter(TEXTS), 100))), vectors)
    assert client.embed([]).shape == (0, 64)
    assert (client.version, client.dimension, client.max_model_len) == ("1", 64, 512)
    short = EmbeddingClient("m", dimensions=8).embed(["x"])
    cut = expected(["x"])[:, :8]
    assert np.allclose(short, cut / np.linalg.norm(cut), atol=1e-6)
    query = EmbeddingClient("narrow", input_type="query").embed(["x"])
    assert np.array_equal(query, expected(["find: x"]))


def test_mistakes_name_the_row(where: Site) -> None:
    """The others of an attempt are embedded all the same."""
    client = EmbeddingClient("m")
    with pytest.raises(InvalidRequestError, match="row 1: the text is empty"):
        client.embed(["a", ""])
    with pytest.raises(ModelNotFoundError, match="there are `m`"):
        EmbeddingClient("n")
    with pytest.raises(InvalidRequestError, match="this model gives 8, 64"):
        EmbeddingClient("m", dimensions=9)
    attempt = client.attempt(["a", None, "b" * 513, "c", "\ud800"])
    assert {row: type(error) for row, error in attempt.errors.items()} == {
        1: InvalidRequestError,
        2: ContextLengthError,
        4: InvalidRequestError,
    }
    assert np.array_equal(attempt.vectors, expected(["a", "c"]))
    cut = EmbeddingClient("m", truncation="start").embed(["a" + "b" * 512])
    assert np.array_equal(cut, expected(["b" * 512]))


def test_an_error_from_another_node_is_the_rows_own(where: Site) -> None:
    """Of its own kind, without the server's traceback; the other rows are embedded, and a job goes on."""
    client = EmbeddingClient("second")
    texts = ["a", "b!", "c"]
    attempt = client.attempt(texts)
    assert np.array_equal(attempt.vectors, expected(["a", "c"]))
    assert {row: (type(error), str(error)) for row, error in attempt.errors.items()} == {
        1: (EngineError, "the engine met its error token")
    }
    with pytest.raises(EngineError, match=r"^row 1: the engine met its error token$"):
        client.embed(texts)
    source, output = where.folder / "bad.csv", where.folder / "bad.parquet"
    source.write_text("\n".join(["text", *texts]))
    command = [program("embedding-cluster"), "embed", str(source), str(output), "--model", "second"]
    done = subprocess.run(command, env=environ(where.address), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    errors = [
        json.loads(line) for line in (where.folder / "bad.parquet.errors.jsonl").read_text().splitlines()
    ]
    assert [error["row"] for error in errors] == [1]


def test_two_applications_may_have_a_worker_of_one_name(where: Site, tmp_path: Path) -> None:
    """Each model's texts go to its own replicas, from one process."""
    file = tmp_path / "m.toml"
    file.write_text(
        workers.fake("m", "seed = 1")
        .replace('models."m"', 'models."twin"')
        .replace("[queue]", "[queue]\nversion = 2")
    )
    arguments = BuildArguments(config=str(file), batches="off")
    serve.run(build(arguments), name="twins", route_prefix="/twins")
    try:
        for _ in range(3):
            for name, seed in (("twin", 1), ("m", 0)):
                vectors = EmbeddingClient(name).embed(TEXTS[:20])
                assert np.array_equal(vectors, expected(TEXTS[:20], seed=seed)), name
    finally:
        serve.delete("twins")


def test_a_hundred_callers_of_one_replica_wait_their_turn(where: Site) -> None:
    """Threads and coroutines, many times what the queue holds: all get their own vectors, none an error."""
    client = EmbeddingClient("narrow")
    mine = [[f"caller {caller} text {number}" for number in range(10)] for caller in range(100)]

    async def gather() -> list[np.ndarray]:
        return await asyncio.gather(*(client.aembed(texts) for texts in mine))

    with ThreadPoolExecutor(100) as pool:
        for texts, vectors in zip(mine, pool.map(client.embed, mine), strict=True):
            assert np.array_equal(vectors, expected(texts))
    for texts, vectors in zip(mine, asyncio.run(gather()), strict=True):
        assert np.array_equal(vectors, expected(texts))


@ray.remote(num_cpus=0)
def embed(client: EmbeddingClient, texts: list[str]) -> np.ndarray:
    """Embed in a task, with a client that came along."""
    return client.embed(texts)


@ray.remote(num_cpus=0)
class Actor:
    """Embeds in its own event loop."""

    def __init__(self, model: str) -> None:
        """Make a client."""
        self._client = EmbeddingClient(model)

    async def embed(self, texts: list[str]) -> np.ndarray:
        """Embed."""
        return await self._client.aembed(texts)


def test_tasks_and_actors_embed(where: Site) -> None:
    """A client may travel."""
    task = embed.remote(EmbeddingClient("m"), TEXTS[:50])
    actor = Actor.remote("m")  # type: ignore[attr-defined]
    answer = actor.embed.remote(TEXTS[50:100])
    assert np.array_equal(np.concatenate(ray.get([task, answer], timeout=90)), expected(TEXTS[:100]))


def test_ray_data_gets_a_tensor_column(where: Site) -> None:
    """From the class itself, and from the helper."""
    dataset = ray.data.from_items([{"text": text} for text in TEXTS[:500]])
    helped = embed_dataset(dataset, "text", "m", batch_texts=100)
    one = ray.data.ActorPoolStrategy(size=1)
    direct = dataset.map_batches(EmbeddingClient, fn_constructor_args=("m",), compute=one, num_cpus=0)
    for result in (helped.materialize(), direct.materialize()):
        rows = result.take_batch(500)
        assert rows["embedding"].dtype == np.float32
        assert rows["embedding"].shape == (500, 64)
        assert np.array_equal(rows["embedding"], expected(list(rows["text"])))
        assert "shape=(64,)" in str(result.schema().types[-1])


def test_the_command_says_what_is_wrong(where: Site) -> None:
    """In a line, with its own exit status."""
    file = where.folder / "in.csv"
    file.write_text("text\na\n")
    for model, column, status, message in (
        ("n", "text", 1, "no model of that name; there are `m`, `narrow`"),
        ("m", "words", 2, "no column `words`; there are `text`"),
    ):
        command = [program("embedding-cluster"), "embed", str(file), str(where.folder / "out.npy")]
        command += ["--model", model, "--column", column]
        done = subprocess.run(
            command, env=environ(where.address), capture_output=True, text=True, check=False
        )
        assert (done.returncode, message in done.stderr) == (status, True), done.stderr


def test_a_dry_run_and_a_trial_on_the_cluster(where: Site) -> None:
    """Too long is what the model's tokenizer says; of a trial there are the first rows."""
    file, output = where.folder / "trial.jsonl", where.folder / "trial.parquet"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b" * 513, "", "c")))
    command = [program("embedding-cluster"), "embed", str(file), str(output), "--model", "m"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environ(where.address), capture_output=True, text=True, check=True
        )

    told = [json.loads(line) for line in run("--dry-run").stdout.splitlines()]
    assert [(each["row"], each["code"], each["reason"]) for each in told] == [
        (1, "context_length_exceeded", "the text has more than the 512 tokens that the model takes"),
        (2, "invalid_request", "the text is empty"),
    ]
    assert not output.exists()
    run("--limit", "2")
    assert pyarrow.parquet.read_table(output)["text"].to_pylist() == ["a"]


def test_a_job_survives_kills_of_itself_a_replica_and_a_node(where: Site) -> None:
    """Every row once, every vector right, at most a part embedded again. Last: the node doesn't come back."""
    rows = kill_job(where, rows=8000, times=4, part_rows=1024, seed=6)
    assert [str(row) for row in rows if not row.met] == []
