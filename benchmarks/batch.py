"""Batch jobs beside people who wait, on a real server: `make batch`.

`throughput` and `neighbours` run the bundled model: 20,000 texts through the client against the engine alone
in a process of its own, and what a person notices of a job. `kills` runs the fake engine, whose vectors are
known: `embedding-cluster embed` is killed at random moments and resumed, a replica and a node die meanwhile.
A row for each measurement; the exit status is 1 if a bound was missed.
"""

import argparse
import asyncio
import contextlib
import functools
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import psutil
import pyarrow as pa
import pyarrow.parquet

from benchmarks.dispatch import Row, Rows, calls_seen, print_rows, slower
from benchmarks.load import Stream, median
from benchmarks.workloads import MODEL, articles
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.engine.tokenizer import TextTokenizer, byte_tokenizer
from tests.harness import workers
from tests.harness.jobs import address_of, start_job
from tests.harness.nodes import HEAD, SECOND, nodes, serve_on
from tests.harness.server import Server, serve, wait_for

TEXTS = 20_000
TRUNCATION: Literal["end"] = "end"
MIB = 2**20
# The fake engine's: as many tokens a second as all-MiniLM-L6-v2 on 2 cores.
FAKE = "call_seconds = 0.003, token_seconds = 0.000036, dimension = 64"
FAKE_DIMENSION = 64
# What health checks embed, and the calls that a killed replica took along.
SPARE_TOKENS = 20_000
# Ray's, of the processes that it starts: the engine alone gets no more of a busy machine than a replica.
REPLICA_NICENESS = 15
TOKENIZER = TextTokenizer(byte_tokenizer())


# --- texts ------------------------------------------------------------------------------------------


class _Newsgroups(pickle.Unpickler):
    """Reads gensim's newsgroups, which an old scikit-learn wrote."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a dictionary for scikit-learn's."""
        if module.startswith("sklearn."):
            return type(name, (dict,), {})
        return super().find_class(module, name)


@functools.cache
def newsgroups() -> list[str]:
    """Return the postings of gensim's `mini_newsgroup`."""
    import gensim

    file = Path(gensim.__file__).with_name("test") / "test_data" / "mini_newsgroup"
    content = zlib.decompress(file.read_bytes())
    found: list[str] = _Newsgroups(io.BytesIO(content), encoding="latin1").load()["data"]
    return found


def corpus(count: int) -> list[str]:
    """Return so many texts: articles and postings, repeated with numbers, none like another."""
    texts = [*articles(), *newsgroups()]
    return [f"{number} {texts[number % len(texts)]}" for number in range(count)]


# --- throughput -----------------------------------------------------------------------------------


@dataclass
class Run:
    """One side's run: tokens, seconds, and for a job its memory over time, as (seconds, bytes)."""

    tokens: int
    seconds: float
    memory: list[tuple[float, int]]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def engine_run(count: int) -> Run:
    """Embed the texts with the engine alone: tokenised batch by batch ahead of the engine, in large calls."""
    from benchmarks import subjects
    from deployments.engine.vllm import VllmEngine

    engine = VllmEngine(subjects.bundled().plan())
    card = engine.start()
    tokenizer = TextTokenizer(card.tokenizer)

    def tokenise(texts: list[str]) -> TokenBatch:
        ids = tokenizer.encode(texts)
        longest = card.max_model_len
        return TokenBatch.of(
            [i if len(i) <= longest else tokenizer.truncate(i, longest, False, True) for i in ids]
        )

    async def run() -> Run:
        texts = corpus(count)
        await engine.embed(tokenise(texts[:64]))
        tokens, begun = 0, time.perf_counter()
        batches = [texts[begin : begin + 256] for begin in range(0, count, 256)]
        ahead = asyncio.ensure_future(asyncio.to_thread(tokenise, batches[0]))
        flying: list[asyncio.Future[Any]] = []
        for number in range(len(batches)):
            batch = await ahead
            if number + 1 < len(batches):
                ahead = asyncio.ensure_future(asyncio.to_thread(tokenise, batches[number + 1]))
            flying.append(asyncio.ensure_future(engine.embed(batch)))
            tokens += batch.tokens
            if len(flying) > 1:
                await flying.pop(0)
        await asyncio.gather(*flying)
        return Run(tokens, time.perf_counter() - begun, [])

    return asyncio.run(run())


def client_run(count: int) -> Run:
    """Embed the texts through the client, in a process outside of Ray Serve, as a stream."""
    from deployments.client import EmbeddingClient

    client = EmbeddingClient(MODEL, truncation=TRUNCATION)
    texts = corpus(count)
    client.embed(texts[:64])
    process, memory = psutil.Process(), []
    tokens, begun = 0, time.perf_counter()
    batches = (texts[begin : begin + 512] for begin in range(0, count, 512))
    for attempt in client.attempts(batches):
        assert not attempt.errors
        tokens += attempt.tokens
        memory.append((time.perf_counter() - begun, process.memory_info().rss))
    return Run(tokens, time.perf_counter() - begun, memory)


def in_process(name: str, count: int, **environment: str) -> Run:
    """Do one of the runs in a process of its own."""
    from benchmarks import subjects

    variables = {**os.environ, **environment, "RAY_AUTH_MODE": "disabled"}
    if name == "engine":
        variables |= subjects.engine_environment(subjects.bundled())
    command = [sys.executable, "-m", "benchmarks.batch", f"--{name}", str(count)]
    if name == "engine":
        command = ["nice", "-n", str(REPLICA_NICENESS), *command]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True)
    run = Run(**json.loads(done.stdout.splitlines()[-1]))
    print(f"  {name}: {run.tokens:,} tokens in {run.seconds:.1f} s", file=sys.stderr, flush=True)
    return run


@contextlib.contextmanager
def bundled() -> Iterator[Server]:
    """Serve the bundled model."""
    import deployments

    config = Path(deployments.__file__).parent / "workers"
    with tempfile.TemporaryDirectory() as folder, serve(config, Path(folder)) as server:
        yield server


def throughput(count: int = TEXTS) -> Rows:
    """The engine alone before and after the client, since a shared machine changes its speed."""
    sides = [in_process("engine", count // 4)]
    with bundled() as server:
        client = in_process("client", count, RAY_ADDRESS=address_of(server))
    sides.append(in_process("engine", count // 4))
    engine = sum(side.tokens for side in sides) / sum(side.seconds for side in sides)
    what = f"{count:,} texts, {client.tokens:,} tokens: client {client.rate:,.0f} tokens/s, engine alone"
    what += f" {sides[0].rate:,.0f} before and {sides[1].rate:,.0f} after"
    yield Row.at_least(what, client.rate / engine, 0.95)
    quarter, end = (rss_at(client, share) for share in (0.25, 1.0))
    what = f"memory of the job's process at the end ({end / MIB:.0f} MiB RSS), against a quarter of the way"
    yield Row.at_most(what, end / quarter, 1.05)


def rss_at(run: Run, share: float) -> float:
    """Return a run's memory around one point of its time: the median of a tenth of the samples."""
    at = int(len(run.memory) * share)
    some = run.memory[max(0, at - len(run.memory) // 10) : at] or run.memory
    return median([float(rss) for _, rss in some])


# --- neighbours ------------------------------------------------------------------------------------


@contextlib.contextmanager
def job_beside(server: Server, folder: Path, rows: int) -> Iterator[None]:
    """Have a job embed so many rows, from its first slices on until the block ends."""
    source, output, log = folder / "in.parquet", folder / "out.npy", folder / "log"
    pa.parquet.write_table(pa.table({"text": corpus(rows)}), source)
    more = ("--model", MODEL, "--truncation", TRUNCATION, "--part-rows", "1024")
    job = start_job(address_of(server), source, output, *more, log=log)
    try:
        parts = output.with_name(f"{output.name}.parts")
        wait_for(lambda: len(list(parts.glob("slice-*.arrow"))) > 2, 60, log)
        yield
        assert job.poll() is None, log.read_text()
    finally:
        job.kill()
        job.wait()


@contextlib.contextmanager
def batch_beside(server: Server, _: Path, rows: int) -> Iterator[None]:
    """Have the Batch API embed so many lines, from the first ones on until the block ends."""
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    body = {"model": MODEL, "encoding_format": "base64", "truncate_prompt_tokens": -1}
    request = {"method": "POST", "url": "/v1/embeddings"}
    lines = [
        json.dumps({"custom_id": str(number), **request, "body": {**body, "input": text}})
        for number, text in enumerate(corpus(rows))
    ]
    file = sdk.files.create(file=("requests.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    state = lambda: sdk.batches.retrieve(batch.id)  # noqa: E731
    counts: Callable[[], Any] = lambda: state().request_counts  # noqa: E731
    try:
        wait_for(lambda: counts().completed, 60, lambda: str(state()))
        yield
        assert state().status == "in_progress", state()
        assert not counts().failed, state()
    finally:
        sdk.batches.cancel(batch.id)
        wait_for(lambda: state().status == "cancelled", 60, lambda: str(state()))


BESIDE = {"a job": job_beside, "a batch of the Batch API": batch_beside}


def neighbours(rounds: int = 3, seconds: float = 15.0) -> Rows:
    """One short text at a time over HTTP, alone and while bulk work saturates the model."""
    with bundled() as server:
        for what in BESIDE:
            yield from beside(server, what, rounds, seconds)


def beside(server: Server, what: str, rounds: int, seconds: float, rows: int = TEXTS) -> Rows:
    """Measure it beside one kind of bulk work."""
    person = Stream(server.url, MODEL, seconds=seconds, pause=0.05, key="person")
    person.run()
    idle, busy = [], []
    for _ in range(rounds):
        idle.append(person.run())
        with tempfile.TemporaryDirectory() as name, BESIDE[what](server, Path(name), rows):
            busy.append(person.run())
    yield slower(f"person beside {what} on the bundled model", idle, busy, 50)
    yield slower(f"person beside {what} on the bundled model", idle, busy, 99, bound=2)
    failed = sum(answer.status != 200 for seen in [*idle, *busy] for answer in seen.answers)
    yield Row.at_most("of the person's requests failed", failed, 0)


# --- kills -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A model `m` with a replica on each of two nodes, and where its engines write down their calls."""

    server: Server
    address: str
    folder: Path
    calls: Path

    @property
    def tokens(self) -> int:
        """Tokens that the engines have been given."""
        return sum(calls_seen(self.calls).values())


@contextlib.contextmanager
def site(folder: Path, more: dict[str, str] | None = None) -> Iterator[Site]:
    """Serve it, and `more` worker files, until the block ends."""
    config, calls = folder / "workers", folder / "calls"
    config.mkdir()
    calls.mkdir()
    deployment = "[deployment]\nnum_replicas = 2\nmax_replicas_per_node = 1"
    text = workers.fake("m", f'{FAKE}, calls_folder = "{calls}"', deployment, "dimensions = [8]")
    for name, content in {"m": text, **(more or {})}.items():
        (config / f"{name}.toml").write_text(content)
    with nodes(folder) as cluster:
        cluster.start(HEAD, "--num-cpus", "2")
        cluster.start(SECOND, "--num-cpus", "1", "--resources", '{"second": 1}')
        with serve_on(cluster, config) as server:
            replicas = lambda: len(server.titled("ServeReplica:default:m"))  # noqa: E731
            wait_for(lambda: replicas() == 2, 120, "two replicas")
            yield Site(server, cluster.address, folder, calls)


def fake_corpus(rows: int) -> list[str | None]:
    """Return texts for the fake engine; one in 97 can't be embedded."""
    return [None if n % 97 == 5 else f"row {n} " + "x" * (n % 90) for n in range(rows)]


def check_rows(output: Path, texts: list[str | None]) -> tuple[int, int]:
    """Return how many rows are missing or double, and how many vectors are wrong."""
    table = pa.parquet.read_table(output)
    file = output.with_name(f"{output.name}.errors.jsonl")  # there where there are errors
    errors = file.read_text().splitlines() if file.exists() else []
    seen = sorted([*table["input_row"].to_pylist(), *(json.loads(line)["row"] for line in errors)])
    misplaced = len(set(seen) ^ set(range(len(texts)))) + len(seen) - len(set(seen))
    embedded = [texts[row] or "" for row in table["input_row"].to_pylist()]
    right = fake_vectors(TokenBatch.of(TOKENIZER.encode(embedded)), FAKE_DIMENSION)
    found = np.stack(table["embedding"].to_numpy())
    return misplaced, int((found != right).any(axis=1).sum())


def kills(rows: int = 24_000, times: int = 5, part_rows: int = 2048, seed: int | None = None) -> Rows:
    """The job is killed at random moments and resumed each time; a replica and then a node die meanwhile."""
    with tempfile.TemporaryDirectory() as name, site(Path(name)) as where:
        yield from kill_job(where, rows, times, part_rows, seed)


def has_slices(parts: Path, count: int) -> bool:
    """Whether a job has written so many slices."""
    return len(list(parts.glob("slice-*.arrow"))) >= count


def kill_job(where: Site, rows: int, times: int, part_rows: int, seed: int | None = None) -> Rows:
    """Do it on a site."""
    seed = random.randrange(2**32) if seed is None else seed
    rng = random.Random(seed)
    texts = fake_corpus(rows)
    source, output = where.folder / "in.parquet", where.folder / "out.parquet"
    pa.parquet.write_table(pa.table({"text": texts}), source)
    before, log = where.tokens, where.folder / "job.log"
    parts = output.with_name(f"{output.name}.parts")
    faults: list[Callable[[], None]] = [lambda: kill_replica(where), lambda: kill_node(where)]
    for number in range(times + 1):
        more = ("--model", "m", "--resume", "--part-rows", str(part_rows))
        job = start_job(where.address, source, output, *more, log=log)
        try:
            if number == times:
                assert job.wait(240) == 0, log.read_text()
                break
            had = len(list(parts.glob("slice-*.arrow")))
            # A random moment of what should take a share of the whole.
            until = had + 1 + rng.random() * rows / (part_rows // 8) / (times + 2)
            wait_for(functools.partial(has_slices, parts, int(until)), 120, log)
            if number % 2 == 1 and faults:
                faults.pop(0)()
            moment = time.monotonic() + rng.random() * 0.3
            time.sleep(max(0.0, moment - time.monotonic()))
            assert job.poll() is None, log.read_text()
        finally:
            job.kill()
            job.wait()
    misplaced, wrong = check_rows(output, texts)
    own = sum(len(text) for text in texts if text)
    extra = where.tokens - before - own
    part = max(sum(len(t) for t in texts[b : b + part_rows] if t) for b in range(0, rows, part_rows))
    yield Row.at_most(f"rows missing or double of {rows:,}, {times} kills (seed {seed})", misplaced, 0)
    yield Row.at_most("vectors that are wrong", wrong, 0)
    what = f"tokens embedded again by a resumed run ({extra:,} in all), in parts of {part:,}"
    yield Row.at_most(what, max(0, extra - SPARE_TOKENS) / times / part, 1)


def kill_replica(where: Site) -> None:
    """Kill one of the model's replicas."""
    os.kill(where.server.titled("ServeReplica:default:m")[0].pid, signal.SIGKILL)


def kill_node(where: Site) -> None:
    """Kill the second node's raylet; what runs on it ends with it."""
    os.kill(where.server.titled(f"--node_ip_address={SECOND}")[0].pid, signal.SIGKILL)


PARTS: dict[str, Callable[[], Rows]] = {"throughput": throughput, "neighbours": neighbours, "kills": kills}


def main() -> int:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.engine or parsed.client:
        run = engine_run(parsed.engine) if parsed.engine else client_run(parsed.client)
        print(json.dumps(vars(run)), flush=True)
        return 0
    return print_rows(row for name in parsed.parts or list(PARTS) for row in PARTS[name]())


if __name__ == "__main__":
    sys.exit(main())
