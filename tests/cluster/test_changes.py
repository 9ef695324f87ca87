"""Worker files are edited while the server runs and clients send: what changes, and that nothing is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.harness import workers
from tests.harness.fake import expected
from tests.harness.server import Server, serve, wait_for

pytestmark = pytest.mark.cluster
REPLICAS = "[deployment]\nnum_replicas = 2\n"
ENGINE = "call_seconds = 0.01, token_seconds = 0.00005"


def model(seed: int = 0, version: int = 1, more: str = REPLICAS, task: str = "") -> str:
    """Return the worker file of a model; another seed is another model."""
    text = workers.fake("m", f"{ENGINE}, seed = {seed}", more, task)
    return text.replace("[queue]", f"[queue]\nversion = {version}")


@dataclass
class Site:
    """A running server and its folder of worker files."""

    server: Server
    folder: Path

    def write(self, name: str, text: str) -> None:
        """Write a worker file and have the server read all of them again."""
        (self.folder / name).write_text(text)
        self.reload()

    def reload(self) -> None:
        """Wait until the server has done so, or has refused."""
        end = ("Ctrl-C", "nothing has changed")
        done = lambda: sum(self.server.log.read_text().count(each) for each in end)  # noqa: E731
        before = done()
        self.server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: done() > before, 120, self.server.log)

    def processes(self, deployment: str) -> set[int]:
        """Return the process ids of a deployment's replicas."""
        return {process.pid for process in self.server.titled(f"ServeReplica:default:{deployment}")}

    def embed(self, texts: list[str], name: str = "m", **fields: object) -> np.ndarray:
        """Return the vectors of texts."""
        body = {"model": name, "input": texts, **fields}
        answer = httpx.post(f"{self.server.url}/v1/embeddings", json=body, timeout=60)
        answer.raise_for_status()
        return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One model with two replicas behind one ingress replica."""
    folder = tmp_path_factory.mktemp("changes")
    config = folder / "workers"
    config.mkdir()
    (config / "m.toml").write_text(model())
    with serve(config, folder) as server:
        wait_for(lambda: "Ctrl-C" in server.log.read_text(), 60, server.log)
        yield Site(server, config)


@dataclass
class Seen:
    """How many answers were of which model, what was neither, what was lost."""

    by_seed: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    mixed: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def load(site: Site) -> Iterator[Seen]:
    """Send requests of several parts, and single ones, without a pause, and look at every vector."""
    seen, stop = Seen(), threading.Event()

    def client(number: int, texts_each: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            texts = [f"{number} {count} {index} " * 10 for index in range(texts_each)]
            try:
                got = site.embed(texts)
            except httpx.HTTPError as error:
                seen.lost.append(repr(error))
                continue
            for seed in seen.by_seed:
                if np.array_equal(got, expected(texts, seed=seed)):
                    seen.by_seed[seed] += 1
                    break
            else:
                seen.mixed += 1

    clients = [threading.Thread(target=client, args=(n, texts)) for n, texts in enumerate((1, 1, 60, 200))]
    for each in clients:
        each.start()
    try:
        wait_for(lambda: sum(seen.by_seed.values()) > 20, 60, "load")
        yield seen
        before = sum(seen.by_seed.values())
        wait_for(lambda: sum(seen.by_seed.values()) > before + 20, 60, "load afterwards")
    finally:
        stop.set()
        for each in clients:
            each.join()


def test_limits_prompts_and_scaling_change_in_place(site: Site) -> None:
    """No engine and no ingress starts anew, and nobody notices but by the new limits."""
    replicas, ingress = site.processes("m"), site.processes("ingress")
    with load(site) as seen:
        more = REPLICAS + "[limits]\nmax_inputs = 200"
        site.write("m.toml", model(more=more, task='prompts = {query = "find: "}'))
        wait_for(lambda: status(site, ["x"] * 201) == 400, 30, "the new limit")
        site.write("m.toml", model(more=more.replace("= 2\n", "= 3\n"), task='prompts = {query = "find: "}'))
        wait_for(lambda: len(site.processes("m")) == 3, 60, "a third replica")
    assert not seen.lost
    assert not seen.mixed
    assert replicas < site.processes("m")
    assert ingress == site.processes("ingress")
    assert np.array_equal(site.embed(["x"], input_type="query"), expected(["find: x"]))


def status(site: Site, texts: list[str]) -> int:
    """Return the status of a request."""
    body = {"model": "m", "input": texts}
    return httpx.post(f"{site.server.url}/v1/embeddings", json=body, timeout=60).status_code


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: model().replace("edition = 1", "edition = 7"), "edition: must be 1, not 7"),
        (lambda: model(seed=1), "1 is deployed with another model"),
    ],
    ids=["a mistake", "another model in the same version"],
)
def test_what_cant_be_deployed_leaves_everything_as_it_is(
    site: Site, change: Callable[[], str], reason: str
) -> None:
    """The reason is told, and the old configuration serves on."""
    replicas, ingress = site.processes("m"), site.processes("ingress")
    site.write("m.toml", change())
    assert reason in site.server.log.read_text()
    assert np.array_equal(site.embed(["still here"]), expected(["still here"]))
    assert (replicas, ingress) == (site.processes("m"), site.processes("ingress"))


def test_a_new_version_rolls_without_mixing(site: Site) -> None:
    """Every answer is of one model through and through; none is lost; in the end all are of the new one."""
    site.write("m.toml", model())
    wait_for(lambda: len(site.processes("m")) == 2, 60, "two replicas")
    before = site.processes("m")
    with load(site) as seen:
        site.write("m.toml", model(seed=1, version=2))
    assert not seen.lost
    assert not seen.mixed
    assert min(seen.by_seed.values()) > 0
    assert np.array_equal(site.embed(["new"]), expected(["new"], seed=1))
    wait_for(lambda: len(site.processes("m")) == 2, 60, "two replicas")
    assert not before & site.processes("m")


def test_a_model_comes_and_goes(site: Site) -> None:
    """While the ingress and the other model serve on."""
    ingress, replicas = site.processes("ingress"), site.processes("m")
    site.write("late.toml", workers.fake("late"))
    assert np.array_equal(site.embed(["hello"], "late"), expected(["hello"]))
    (site.folder / "late.toml").unlink()
    site.reload()
    wait_for(lambda: not site.processes("late"), 60, "its replica's end")
    body = {"model": "late", "input": "x"}
    assert httpx.post(f"{site.server.url}/v1/embeddings", json=body, timeout=60).status_code == 404
    assert (ingress, replicas) == (site.processes("ingress"), site.processes("m"))
