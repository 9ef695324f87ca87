"""Everything at once, while processes are killed: `make soak`.

Clients of every dialect, with keys, jobs, batches and edits of the worker files, for 30 minutes, on the tuned
start; each 20 s one process of the cluster, drawn at random, is killed. Nothing may be lost or wrong, memory
and file descriptors stay as they were, and nothing is left in the end. Clients try again as OpenAI's does.

The raylet, Ray's GCS and the command that serves are spared: all ends with them here, as it should.
"""

import argparse
import contextlib
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pyarrow as pa
import pyarrow.parquet

from benchmarks.batch import check_rows
from deployments.keys.file import Key, create_key
from tests.harness import workers
from tests.harness.fake import expected
from tests.harness.jobs import address_of, start_job
from tests.harness.server import PATIENCE, Server, serve, wait_for

MINUTES, KILL_SECONDS, RELOAD_SECONDS, LOOK_SECONDS = 30.0, 20.0, 30.0, 2.0
# Memory is compared with that of the sixth minute: by then all is loaded, and has been replaced once.
WARM_SECONDS, WINDOW_SECONDS = 300.0, 60.0
MOST_GROWTH = 1.05
RETRIES, AGAIN = 5, (408, 409, 429, 500, 502, 503, 504)
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 8.0
CLIENT_PAUSE_SECONDS = 0.02
LINES, ROWS, PART_ROWS, END_SECONDS = 200, 2000, 512, 120
REPLICA = "ServeReplica:default:"
VICTIMS = {
    "replica": f"{REPLICA}m",
    "ingress": f"{REPLICA}ingress",
    "batch runner": f"{REPLICA}batches",
    "rates": f"{REPLICA}rates",
    "controller": "ServeController",
    "proxy": "ProxyActor",
    "HAProxy": "haproxy.cfg",
    "HAProxy's guard": "guard.py",
    "HAProxy manager": "HAProxyManager",
}
Texts = list[str]
# By dialect: the path, the body for texts, the vectors of an answer.
DIALECTS: dict[str, tuple[str, Callable[[Texts], dict[str, Any]], Callable[[Any], Any]]] = {
    "OpenAI": (
        "/v1/embeddings",
        lambda texts: {"input": texts},
        lambda told: [each["embedding"] for each in told["data"]],
    ),
    "Cohere": (
        "/v2/embed",
        lambda texts: {"texts": texts, "input_type": "search_document", "embedding_types": ["float"]},
        lambda told: told["embeddings"]["float"],
    ),
    "TEI": ("/embed", lambda texts: {"inputs": texts}, lambda told: told),
    "vLLM": (
        "/pooling",
        lambda texts: {"input": texts},
        lambda told: [each["data"] for each in told["data"]],
    ),
    "Pharia": (
        "/batch_semantic_embed",
        lambda texts: {"prompts": texts, "representation": "document"},
        lambda told: told["embeddings"],
    ),
}


@dataclass
class Seen:
    """What was sent and came back right, by kind; what didn't, and why; what was done to the server."""

    right: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    killed: Counter[str] = field(default_factory=Counter)
    looks: list[tuple[float, int, int]] = field(default_factory=list)  # when, bytes, file descriptors
    left: list[str] = field(default_factory=list)

    def medians(self, since: float, until: float) -> tuple[float, float]:
        """Return the medians of bytes and file descriptors between two times."""
        looks = [(size, files) for at, size, files in self.looks if since <= at < until]
        sizes, files = zip(*looks, strict=True)
        return statistics.median(sizes), statistics.median(files)


@dataclass(frozen=True)
class Site:
    """A server, its worker files, a key of its, and where jobs write."""

    server: Server
    folder: Path
    secret: str
    seen: Seen
    stop: threading.Event


def send(site: Site, dialect: str, number: int) -> None:
    """Send requests of one dialect, one after the other, and look at every vector."""
    path, body, vectors = DIALECTS[dialect]
    with httpx.Client(base_url=site.server.url, timeout=60) as client:
        for count in itertools.count():
            if site.stop.wait(CLIENT_PAUSE_SECONDS):
                return
            texts = [f"{dialect} {number} {count} {index}" for index in range(1 + count % 3 * 8)]
            answer = ask(site, dialect, lambda t=texts: client.post(  # type: ignore[misc]
                path, json={"model": "m", **body(t)}, headers={"authorization": f"Bearer {site.secret}"}
            ))  # fmt: skip
            if answer is None:
                continue
            if np.array_equal(np.array(vectors(answer.json()), np.float32), expected(texts)):
                site.seen.right[dialect] += 1
            else:
                site.seen.wrong.append(f"{dialect}: {texts[0]}")


def refuse(site: Site) -> None:
    """Send requests with a wrong key, each of which is refused."""
    with httpx.Client(base_url=site.server.url, timeout=60) as client:
        body, wrong = {"model": "m", "input": "x"}, {"x-api-key": "wrong"}
        while not site.stop.wait(0.2):
            asked = lambda: client.post("/v1/embeddings", json=body, headers=wrong)  # noqa: E731
            ask(site, "wrong keys", asked, 401)
            site.seen.right["wrong keys"] += 1


def ask(
    site: Site, kind: str, call: Callable[[], httpx.Response], status: int = 200
) -> httpx.Response | None:
    """Return the answer with that status, asked for again as OpenAI's client does; None where it is lost."""
    told = ""
    for number in range(RETRIES + 1):
        if number:
            site.seen.retried[kind] += 1
            time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (number - 1), MAX_PAUSE_SECONDS))
        try:
            answer = call()
        except httpx.TransportError as error:
            told = repr(error)
            continue
        if answer.status_code == status:
            return answer
        told = f"{answer.status_code} {answer.text[:300]}"
        if answer.status_code not in AGAIN:
            break
    site.seen.lost.append(f"{datetime.now(UTC):%H:%M:%S} {kind}: {told}")
    return None


def run_batches(site: Site) -> None:
    """Make one batch after the other; each line of each is answered once, and right."""
    sdk = openai.OpenAI(base_url=f"{site.server.url}/v1", api_key=site.secret, max_retries=RETRIES)
    texts = [f"line {number}" for number in range(LINES)]
    right = expected(texts)
    request = {"method": "POST", "url": "/v1/embeddings"}
    lines = [
        json.dumps({"custom_id": text, **request, "body": {"model": "m", "input": text}}) for text in texts
    ]
    while not site.stop.wait(1.0):
        file = sdk.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = sdk.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        ended = lambda: sdk.batches.retrieve(batch.id).completed_at  # noqa: B023, E731
        wait_for(ended, END_SECONDS, lambda: str(sdk.batches.retrieve(batch.id)))  # noqa: B023
        output = sdk.batches.retrieve(batch.id).output_file_id
        assert output is not None
        answers = [json.loads(line) for line in sdk.files.content(output).text.splitlines()]
        found = [each["response"]["body"]["data"][0]["embedding"] for each in answers]
        in_order = [each["custom_id"] for each in answers] == texts
        if in_order and np.array_equal(np.array(found, np.float32), right):
            site.seen.right["batch lines"] += LINES
        else:
            site.seen.wrong.append(f"batch {batch.id}: {len(answers)} lines")
        for name in (file.id, output):
            sdk.files.delete(name)


def run_jobs(site: Site) -> None:
    """Run one job after the other; each row is in the output once, and right."""
    source, log = site.folder / "in.parquet", site.folder / "job.log"
    texts: list[str | None] = [f"row {number}" for number in range(ROWS)]
    pa.parquet.write_table(pa.table({"text": texts}), source)
    for number in itertools.count():
        if site.stop.wait(1.0):
            return
        output = site.folder / f"out-{number}.parquet"
        more = ("--model", "m", "--part-rows", str(PART_ROWS))
        job = start_job(address_of(site.server), source, output, *more, log=log)
        try:
            status = job.wait(PATIENCE * END_SECONDS)
        finally:
            job.kill()
        if status != 0:
            site.seen.lost.append(f"job {number}: {log.read_text()[-2000:]}")
            continue
        if check_rows(output, texts) == (0, 0):
            site.seen.right["job rows"] += ROWS
        else:
            site.seen.wrong.append(f"job {number}: {check_rows(output, texts)}")


def reload(site: Site) -> None:
    """Edit the worker files again and again: a prompt and a limit change, a model comes and goes."""
    config, end = site.folder / "workers", ("Ctrl-C", "nothing has changed")
    done = lambda: sum(site.server.log.read_text().count(each) for each in end)  # noqa: E731
    for number in itertools.count(1):
        if site.stop.wait(RELOAD_SECONDS):
            return
        before = done()
        (config / "m.toml").write_text(model(number))
        (config / "late.toml").write_text(workers.fake("late"))
        if number % 2:
            (config / "late.toml").unlink()
        site.server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: done() > before, END_SECONDS, site.server.log)  # noqa: B023
        site.seen.right["reloads"] += 1


def model(number: int = 0) -> str:
    """Return the worker file of the model that is asked; its vectors are the same whatever the number."""
    task = f'prompts = {{question = "{number}: "}}'
    more = f"[deployment]\nnum_replicas = 2\n[limits]\nmax_inputs = {1000 + number % 7}"
    return workers.fake("m", "call_seconds = 0.002", more, task)


def watch(site: Site) -> None:
    """Note what all processes of the server take together."""
    while not site.stop.wait(LOOK_SECONDS):
        size = files = 0
        for process in site.server.processes():
            with contextlib.suppress(psutil.Error):
                size += process.memory_info().rss
                files += process.num_fds()
        site.seen.looks.append((time.monotonic(), size, files))


def kill_one(site: Site, rng: random.Random) -> None:
    """Kill a process that is drawn: first of which kind, then which one."""
    living = {kind: found for kind, title in VICTIMS.items() if (found := site.server.titled(title))}
    # The guard's arguments name the configuration too; HAProxy is the older of the two.
    living["HAProxy"] = living["HAProxy"][:1] if "HAProxy" in living else []
    kind = rng.choice(sorted(kind for kind, found in living.items() if found))
    process = rng.choice(living[kind])
    print(f"{datetime.now(UTC):%H:%M:%S} {kind} {process.pid} is killed", flush=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    site.seen.killed[kind] += 1


@contextlib.contextmanager
def served() -> Iterator[Site]:
    """Serve a model with two replicas behind two ingress replicas, with keys; note what is left."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        folder = Path(name)
        (folder / "workers").mkdir()
        (folder / "workers" / "m.toml").write_text(model())
        keys = folder / "keys.json"
        secret = create_key(keys, lambda sha256: Key(name="soak", sha256=sha256, created=datetime.now(UTC)))
        seen = Seen()
        with serve(
            folder / "workers", folder, {"TMPDIR": temporary}, ingress_replicas=2, keys=keys
        ) as server:
            wait_for(lambda: "Ctrl-C" in server.log.read_text(), END_SECONDS, server.log)
            (first, *_) = server.titled(f"{REPLICA}m")
            private = Path(first.environ()["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
            yield Site(server, folder, secret, seen, threading.Event())
        seen.left = [str(path) for path in (*Path(temporary).rglob("*"), private) if path.exists()]


def soak(seconds: float, seed: int, kill_seconds: float = KILL_SECONDS) -> tuple[Seen, float]:
    """Let all of it run for so long, a process killed each so often; return what was seen, and its begin."""
    rng = random.Random(seed)
    with served() as site:

        def guarded(work: Callable[..., None], *arguments: Any) -> None:
            try:
                work(site, *arguments)
            except Exception as error:  # it is told, whatever it is
                site.seen.lost.append(f"{work.__name__}: {type(error).__name__}: {error}"[:3000])

        works = [(send, dialect, number) for number, dialect in enumerate(DIALECTS)]
        works += [(each,) for each in (refuse, run_batches, run_jobs, reload, watch)]  # type: ignore[misc]
        threads = [threading.Thread(target=guarded, args=each) for each in works]
        for each in threads:
            each.start()
        began = time.monotonic()
        try:
            while time.monotonic() < began + seconds and site.server.process.poll() is None:
                time.sleep(min(kill_seconds, max(0.1, began + seconds - time.monotonic())))
                if time.monotonic() < began + seconds:
                    kill_one(site, rng)
        finally:
            site.stop.set()
            for each in threads:
                each.join()
        if site.server.process.poll() is not None:
            site.seen.lost.append(f"the server has ended: {site.server.log.read_text()[-3000:]}")
    return site.seen, began


def main() -> int:
    """Soak, and print what was seen; the exit status says whether anything was lost, wrong, grown or left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=random.randrange(2**16))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    seen, began = soak(60 * given.minutes, given.seed)
    for name, counted in (("right", seen.right), ("tried again", seen.retried), ("killed", seen.killed)):
        print(f"{name}: {', '.join(f'{kind} {count:,}' for kind, count in counted.items())}")
    for name, told in (("lost", seen.lost), ("wrong", seen.wrong), ("left over", seen.left)):
        print("\n".join([f"{name}: {len(told)}", *told[:10]]))
    failed = bool(seen.lost or seen.wrong or seen.left)
    end = seen.looks[-1][0]
    since = began + min(WARM_SECONDS, (end - began) / 2)
    size, files = seen.medians(since, since + WINDOW_SECONDS)
    last_size, last_files = seen.medians(end - WINDOW_SECONDS, end + 1)
    print(f"MiB: {size / 2**20:,.0f} after {since - began:.0f} s, {last_size / 2**20:,.0f} at the end")
    print(f"file descriptors: {files:,.0f}, {last_files:,.0f}")
    if end - began > WARM_SECONDS + 2 * WINDOW_SECONDS:
        failed |= last_size > MOST_GROWTH * size or last_files > MOST_GROWTH * files
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
