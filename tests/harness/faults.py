"""Faults under load: clients that check every vector, and what is killed or stopped meanwhile."""

import contextlib
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import psutil

from tests.harness import checkpoints, workers
from tests.harness.fake import expected
from tests.harness.nodes import HEAD, SECOND, nodes, serve_on
from tests.harness.server import Server, serve, wait_for

CLIENTS = 8
SECONDS_BEFORE = 5.0
SECONDS_AFTER = 20.0
SDK_RETRIES = 2
REPLICA = "ServeReplica:default:{model}"
RANK = "VLLM::Worker"
DIMENSION = 64
KNOWN_TEXTS = 64
MIN_COSINE = 0.999


@dataclass(frozen=True)
class Fault:
    """A signal for one of the processes whose title holds `title`; `retries` are the client's.

    With `two_nodes` it happens on a cluster of two, a replica of the model on each; with `ranks` to vLLM
    with so many tensor parallel ranks a replica, which share what cores there are.
    """

    name: str
    title: str
    number: signal.Signals
    retries: int = 0
    two_nodes: bool = False
    ranks: int = 0
    seconds_after: float = SECONDS_AFTER


FAULTS = (
    Fault("replica killed", REPLICA, signal.SIGKILL),
    Fault("replica stopped", REPLICA, signal.SIGSTOP),
    Fault("ingress killed", "ServeReplica:default:ingress", signal.SIGKILL, SDK_RETRIES),
    Fault("controller killed", "ServeController", signal.SIGKILL),
    # Long enough for Ray Serve to put another one in its place.
    Fault("proxy killed", "ProxyActor", signal.SIGKILL, SDK_RETRIES, seconds_after=60.0),
    Fault("HAProxy killed", "haproxy.cfg", signal.SIGKILL, SDK_RETRIES),
    Fault("HAProxy manager killed", "HAProxyManager", signal.SIGKILL),
    # Raylets alone spell this option with underscores; their workers end with them.
    Fault("raylet killed", f"--node_ip_address={SECOND}", signal.SIGKILL, SDK_RETRIES, two_nodes=True),
    # Long enough for the new replica to load the model, and to be given work, under the load.
    Fault("rank killed", RANK, signal.SIGKILL, ranks=2, seconds_after=100.0),
)


@dataclass
class Load:
    """What the clients saw: when each request began, how long it took, how it ended."""

    began: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: int = 0
    retried: int = 0

    def p99(self, since: float, until: float, ended_by: float = float("inf")) -> float:
        """Return the 99th percentile of the requests that began in that time, in milliseconds."""
        times = zip(self.began, self.took, strict=True)
        seconds = [t for b, t in times if since <= b < until and b + t <= ended_by]
        return statistics.quantiles(seconds, n=100)[98] * 1000 if len(seconds) > 1 else float("nan")


class FakeTexts:
    """Texts for the fake engine, each of them new, and what their vectors must be."""

    def text(self, count: int) -> str:
        """Return a client's next text."""
        return f"client {threading.get_ident()} text {count}"

    def is_right(self, text: str, vector: np.ndarray) -> bool:
        """Return whether it is the text's vector, to the bit."""
        return np.array_equal(vector, expected([text], DIMENSION)[0])


class KnownTexts:
    """Texts for a real engine, which has to give about the vectors that it gave at first."""

    def __init__(self, url: str, model: str) -> None:
        """Have the texts embedded, all in one request."""
        self._texts = [f"Text number {count} of a client that sends" for count in range(KNOWN_TEXTS)]
        sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        answer = sdk.embeddings.create(model=model, input=self._texts)
        vectors = [np.array(each.embedding, np.float32) for each in answer.data]
        self._vectors = dict(zip(self._texts, vectors, strict=True))

    def text(self, count: int) -> str:
        """Return a client's next text; clients begin in different places."""
        return self._texts[(threading.get_ident() // 4096 + count) % len(self._texts)]

    def is_right(self, text: str, vector: np.ndarray) -> bool:
        """Return whether it is nearly the vector that the text had at first."""
        known = self._vectors[text]
        return float(vector @ known) >= MIN_COSINE * float(np.linalg.norm(vector) * np.linalg.norm(known))


Texts = FakeTexts | KnownTexts


@dataclass(frozen=True)
class Traffic:
    """What clients send, where to, and how often they try."""

    url: str
    model: str
    retries: int
    texts: Texts


def client(traffic: Traffic, load: Load, stop: threading.Event) -> None:
    """Send one text after the other, and check what comes back."""
    sdk = openai.OpenAI(
        base_url=f"{traffic.url}/v1", api_key="unused", max_retries=traffic.retries, timeout=60
    )
    count = 0
    while not stop.is_set():
        count += 1
        text = traffic.texts.text(count)
        began = time.monotonic()
        try:
            raw = sdk.embeddings.with_raw_response.create(model=traffic.model, input=text)
            vector = np.array(raw.parse().data[0].embedding, np.float32)
        except openai.OpenAIError as error:
            load.lost.append(f"{type(error).__name__}: {error}"[:200])
            continue
        load.began.append(began)
        load.took.append(time.monotonic() - began)
        load.retried += raw.retries_taken
        load.wrong += not traffic.texts.is_right(text, vector)


def run(
    server: Server,
    fault: Fault,
    model: str = "m",
    before: float = SECONDS_BEFORE,
    after: float | None = None,
) -> tuple[Load, list[str]] | None:
    """Put the server under load, do the fault, and return what the clients saw and the table's row."""
    title = fault.title.format(model=model)
    if not server.titled(title):
        return None
    after = after or fault.seconds_after
    texts: Texts = KnownTexts(server.url, model) if fault.ranks else FakeTexts()
    traffic = Traffic(server.url, model, fault.retries, texts)
    load, stop = Load(), threading.Event()
    clients = [threading.Thread(target=client, args=(traffic, load, stop)) for _ in range(CLIENTS)]
    began = time.monotonic()
    for each in clients:
        each.start()
    try:
        wait_for(lambda: time.monotonic() > began + before, 60, "load before the fault")
        process = server.titled(title)[0]  # HAProxy is another one after each change of what it serves
        at = time.monotonic()
        os.kill(process.pid, fault.number)
        wait_for(lambda: time.monotonic() > at + after, 120, "load after the fault")
    finally:
        stop.set()
        for each in clients:
            each.join()
    if fault.number == signal.SIGSTOP:
        _end(process)
    slow = [b + t - at for b, t in zip(load.began, load.took, strict=True) if b + t > at and t > 1]
    row = [
        fault.name,
        str(len(load.began) + len(load.lost)),
        str(len(load.began)),
        str(load.retried),
        str(len(load.lost)),
        str(load.wrong),
        f"{load.p99(began, at, ended_by=at):.0f}",
        f"{load.p99(at - 1, at + 5):.0f}",
        f"{load.p99(at + after / 2, at + after):.0f}",
        f"{max(slow, default=0.0):.1f}",
    ]
    return load, row


def _end(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        pass


@contextlib.contextmanager
def served(fault: Fault, tuned: bool) -> Iterator[Server]:
    """Serve one model with two replicas behind two ingress replicas, as the fault needs them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "workers"
        config.mkdir()
        deployment = "[deployment]\nnum_replicas = 2"
        text = workers.fake("m", "call_seconds = 0.01", deployment)
        if fault.two_nodes:
            text += "max_replicas_per_node = 1\n"
        if fault.ranks:
            generator = (
                f'type = "vllm"\nmodel_path = "{checkpoints.minilm()}"\ntensor_parallel_size = {fault.ranks}'
            )
            text = workers.worker("m", generator, f"{deployment}\nnum_cpus = 1\nnum_gpus = 0")
        (config / "m.toml").write_text(text)
        if not fault.two_nodes and not fault.ranks:
            with serve(config, folder, tuned=tuned, ingress_replicas=2) as server:
                yield server
            return
        with nodes(folder, tuned) as cluster:
            # As many CPUs as two replicas want, be there as few cores as there are.
            cluster.start(HEAD, "--num-cpus", str(max(1, 2 * fault.ranks)))
            if fault.two_nodes:
                cluster.start(SECOND)
            with serve_on(cluster, config, ingress_replicas=2) as server:
                replicas = lambda: len(server.titled(REPLICA.format(model="m")))  # noqa: E731
                ranks = lambda: len(server.titled(RANK))  # noqa: E731
                wait_for(lambda: replicas() == 2 and ranks() == 2 * fault.ranks, 120, "two replicas")
                yield server
