"""`serve deploy` of the files that `plan --format serve` writes, on a cluster that `ray start` began."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from deployments.keys.file import Key, create_key
from tests.harness import fake, workers
from tests.harness.server import MARK, Server, free_port, is_ready, wait_for

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent


@dataclass
class Site:
    """A cluster that serves under a prefix, its dashboard's address, the folder of worker files, a key."""

    server: Server
    dashboard: str
    folder: Path
    key: str

    def deploy(self) -> None:
        """Write the deploy file anew, and deploy it."""
        plan: list[str | Path] = [
            BIN / "embedding-cluster",
            "plan",
            "--format",
            "serve",
            self.folder / "workers",
        ]
        written = subprocess.run(
            plan, capture_output=True, text=True, check=True, env=environ(self.server.mark)
        )
        document = yaml.safe_load(written.stdout)
        url = httpx.URL(self.server.url)
        document["http_options"] = {"host": url.host, "port": url.port}
        (application,) = document["applications"]
        application["route_prefix"] = url.path
        application["args"]["keys"] = str(self.folder / "keys.json")
        file = self.folder / "deploy.yaml"
        file.write_text(yaml.safe_dump(document))
        command: list[str | Path] = [BIN / "serve", "deploy", "-a", self.dashboard, file]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environ(self.server.mark)
        )
        assert result.returncode == 0, result.stderr

    def application(self) -> dict[str, Any]:
        """Return what Ray Serve says of the application."""
        details = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()
        found: dict[str, Any] = details["applications"].get("default", {})
        return found

    def embed(self, text: str, **fields: object) -> httpx.Response:
        """Send one request."""
        body = {"model": "m", "input": text, **fields}
        return httpx.post(f"{self.server.url}/v1/embeddings", json=body, headers=self.headers, timeout=60)

    @property
    def headers(self) -> dict[str, str]:
        """Return those of a client that is no operator."""
        return {"x-api-key": self.key}

    def replicas(self, deployment: str) -> set[int]:
        """Return the process ids of a deployment's replicas."""
        return {process.pid for process in self.server.titled(f"ServeReplica:default:{deployment}")}


def environ(mark: str) -> dict[str, str]:
    """Return the environment of everything that belongs to the cluster."""
    return {
        **os.environ,
        MARK: mark,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody takes over what runs on the last node
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A head node on this machine that serves one fake model with two replicas."""
    folder, mark, dashboard = tmp_path_factory.mktemp("deploy"), uuid.uuid4().hex, free_port()
    command: list[str | Path] = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={free_port()}",
    ]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # A short path: Ray adds 56 characters to it, and a socket's path may have 97.
    own = Path(tempfile.mkdtemp(prefix="deploy-", dir="/tmp"))
    log = folder / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environ(mark), "RAY_TMPDIR": str(own)},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{free_port()}/emb", process, log, mark)
    site = Site(server, f"http://127.0.0.1:{dashboard}", folder, make_key(folder, "client"))
    try:
        wait_for(lambda: process.poll() is not None or is_up(site.dashboard), 90, log)
        (folder / "workers").mkdir()
        write(site)
        site.deploy()
        wait_for(lambda: is_ready(server.url), 90, lambda: str(site.application()))
        yield site
    finally:
        try:
            server.stop(signal.SIGTERM)
        finally:
            shutil.rmtree(own, ignore_errors=True)


def make_key(folder: Path, name: str, **fields: Any) -> str:
    """Add a key to the site's file; return its plaintext."""
    created = datetime.now(UTC)
    return create_key(
        folder / "keys.json", lambda sha256: Key(name=name, sha256=sha256, created=created, **fields)
    )


def is_up(dashboard: str) -> bool:
    """Return whether the dashboard's part for Serve answers."""
    try:
        return httpx.get(f"{dashboard}/api/serve/applications/", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def write(site: Site, task: str = "", replicas: int = 2, seed: int = 0, version: int = 1) -> None:
    """Write the worker file."""
    text = workers.fake("m", f"seed = {seed}", f"[deployment]\nnum_replicas = {replicas}", task)
    file = site.folder / "workers" / "m.toml"
    file.write_text(text.replace("[queue]", f"[queue]\nversion = {version}"))


def expected(text: str, seed: int = 0) -> np.ndarray:
    """Return the right vector of a text."""
    vector: np.ndarray = fake.expected([text], seed=seed)[0]
    return vector


def is_vector(answer: httpx.Response, vector: np.ndarray) -> bool:
    """Whether an answer holds just this vector."""
    found = answer.is_success and np.array(answer.json()["data"][0]["embedding"], np.float32)
    return np.array_equal(found, vector)


def test_a_prefix_opens_and_closes_nothing(site: Site) -> None:
    """Whoever has no key finds what is public; the metrics are the operators'."""
    operator = {"x-api-key": make_key(site.folder, "operator", operator=True)}

    def ask(path: str, headers: dict[str, str] | None = None) -> int:
        return httpx.get(site.server.url + path, headers=headers, timeout=60).status_code

    for path in ("/health", "/v1/ready", "/docs", "/openapi.json", "/ui", "/ui/main.js"):
        assert ask(path) == 200, path
    for path in ("/metrics", "/v1/metrics", "/v1/metrics%0A"):
        # The file was changed just now; all ingress replicas read it again within seconds.
        wait_for(lambda path=path: ask(path, operator) == 200, 60, path)  # type: ignore[misc]
        assert (ask(path), ask(path, site.headers)) == (401, 403), path
    assert site.embed("hello").status_code == 200


def test_prompts_and_scaling_change_in_place(site: Site) -> None:
    """The replicas that there were serve on."""
    replicas, ingress = site.replicas("m"), site.replicas("ingress")
    assert len(replicas) == len(ingress) == 2
    write(site, task='prompts = {query = "find: "}', replicas=3)
    site.deploy()
    wait_for(lambda: len(site.replicas("m")) == 3, 60, "a third replica")
    prompted = lambda: is_vector(site.embed("x", input_type="query"), expected("find: x"))  # noqa: E731
    wait_for(prompted, 30, "the prompt on both ingress replicas")
    assert replicas < site.replicas("m")
    assert ingress == site.replicas("ingress")


def test_a_submitted_job_embeds(site: Site) -> None:
    """`ray job submit` runs the command on the cluster; nothing has to be told where that is."""
    source, output = site.folder / "in.csv", site.folder / "out.npy"
    source.write_text("text\nhello\nworld\n")
    command: list[str | Path] = [BIN / "ray", "job", "submit", "--address", site.dashboard, "--"]
    command += [BIN / "embedding-cluster", "embed", source, output, "--model", "m"]
    told = ""

    def is_taken() -> bool:
        """Submit; an agent that isn't up yet refuses."""
        nonlocal told
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environ(site.server.mark), timeout=120
        )
        told = result.stdout + result.stderr
        assert result.returncode == 0 or "No available agent" in told, told
        return result.returncode == 0

    wait_for(is_taken, 60, lambda: told)
    assert np.array_equal(np.load(output), [expected("hello"), expected("world")])


def test_what_cant_be_built_leaves_the_old_configuration_serving(site: Site) -> None:
    """The reason stands in the application's state: another model in the same version."""
    replicas, ingress = site.replicas("m"), site.replicas("ingress")
    write(site, seed=1)
    site.deploy()
    wait_for(lambda: site.application()["status"] == "DEPLOY_FAILED", 60, lambda: str(site.application()))
    assert "is deployed with another model" in site.application()["message"]
    assert is_vector(site.embed("hello"), expected("hello"))
    assert (replicas, ingress) == (site.replicas("m"), site.replicas("ingress"))


def test_another_model_in_another_version_takes_over(site: Site) -> None:
    """After the refusal, too."""
    write(site, seed=1, version=2)
    site.deploy()
    wait_for(lambda: is_vector(site.embed("hello"), expected("hello", 1)), 90, "the new model")
    wait_for(lambda: site.application()["status"] == "RUNNING", 90, "the deployment's end")
    assert is_vector(site.embed("again"), expected("again", 1))
