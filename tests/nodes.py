"""Starts clusters of several raylets on this machine, and the application on them as an operator does.

Each node has a loopback address of its own, and Ray's files lie in a folder of their own: `ray.init()`
of somebody else on this machine mustn't find this cluster.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deployments.launch import switches
from tests.server import (
    MARK,
    START_SECONDS,
    STOP_SECONDS,
    Server,
    deploy_file,
    free_port,
    is_ready,
    program,
    wait_for,
)

HEAD, SECOND = "127.0.0.2", "127.0.0.3"
OBJECT_STORE_BYTES = 150 * 2**20
STARTED = "Ray runtime started"


@dataclass
class Nodes:
    """Raylets joined to one cluster. What is started with `environ` belongs to it."""

    folder: Path
    environ: dict[str, str]
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # the head first

    def start(self, ip: str, *arguments: str) -> None:
        """Start a node, the first as the head, and wait until it is up."""
        port = free_port()
        where = ["--address", self.address]
        if not self.address:
            self.address = f"{ip}:{port}"
            # Ray's client server has a fixed port otherwise.
            where = ["--head", "--port", str(port), "--ray-client-server-port", str(free_port())]
            where += ["--include-dashboard", "false", "--disable-usage-stats"]
        common = ["--node-ip-address", ip, "--object-store-memory", str(OBJECT_STORE_BYTES)]
        common += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
        log = self.folder / f"node-{ip}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program("ray"), "start", "--block", *where, *common, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environ,
                start_new_session=True,
            )
        self.processes.append(process)
        wait_for(lambda: STARTED in log.read_text() or process.poll() is not None, START_SECONDS, log)
        assert process.poll() is None, log.read_text()


@contextlib.contextmanager
def nodes(folder: Path, tuned: bool = False, environ: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """Make room for a cluster; at the end nothing is left of what was started in it."""
    mark = uuid.uuid4().hex
    # A short path: Ray adds 56 characters to it, and a socket's path may have 97.
    own = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
    variables = {
        **os.environ,
        MARK: mark,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(own),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody takes over what runs on the last node
    }
    cluster = Nodes(folder, variables | (switches(own) if tuned else {}) | dict(environ or {}))
    everything = Server("", subprocess.Popen(["true"]), folder, mark)
    try:
        yield cluster
    finally:
        everything.nodes = tuple(cluster.processes)
        everything.stop()
        shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def serve_on(cluster: Nodes, config: Path, ingress_replicas: int = 1) -> Iterator[Server]:
    """Run `serve run` on a cluster, wait until every model is ready, take it down at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = deploy_file(config, cluster.folder, port, ingress_replicas)
    log = cluster.folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program("serve"), "run", "--address", cluster.address, str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=cluster.environ,
            start_new_session=True,
        )
    try:
        wait_for(lambda: process.poll() is not None or is_ready(url), START_SECONDS, log)
        assert process.poll() is None, log.read_text()
        yield Server(url, process, log, cluster.environ[MARK])
    finally:
        process.send_signal(signal.SIGTERM)  # it ignores SIGINT in the background
        process.wait(STOP_SECONDS)
