"""Starts clusters of several raylets on this machine, and the application on them as an operator does.

Each node has a loopback address of its own, and Ray's files lie in a folder of their own: `ray.init()`
of somebody else on this machine mustn't find this cluster.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deployments.front.switches import switches
from tests.harness.server import (
    MARK,
    PATIENCE,
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
IDLE_SECONDS = 3
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
FAKE_HEAD_NODE_ID = "f" * 51 + "00000"
STARTED = "Ray runtime started"


@dataclass
class Nodes:
    """Raylets joined to one cluster. What is started with `environ` belongs to it."""

    folder: Path
    environ: dict[str, str]
    address: str  # of the head
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # the head first

    def start(self, ip: str, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        """Start a node, the first as the head, and wait until it is up."""
        where = ["--address", self.address]
        if not self.processes:
            # Ray's client server has a fixed port otherwise.
            where = ["--head", "--ray-client-server-port", str(free_port())]
            where += ["--port", self.address.rpartition(":")[2]]
            where += ["--include-dashboard", "false", "--disable-usage-stats"]
        common = ["--node-ip-address", ip, "--object-store-memory", str(OBJECT_STORE_BYTES)]
        common += ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
        log = self.folder / f"node-{ip}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program("ray"), "start", "--block", *where, *common, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environ, **(environ or {})},
                start_new_session=True,
            )
        self.processes.append(process)
        wait_for(lambda: STARTED in log.read_text() or process.poll() is not None, START_SECONDS, log)
        assert process.poll() is None, log.read_text()

    def start_autoscaling(self, head_cpus: int, worker_cpus: int) -> None:
        """Start a head that adds at most one node on demand, by Ray's fake provider, and removes it again."""
        provider = {
            # By the class's name: for its short name Ray reads a file that its wheel doesn't hold.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "gcs_address": self.address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        }
        node_types = {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": worker_cpus}, "node_config": {}, "max_workers": 1},
        }
        content = {
            "cluster_name": "fake",
            "max_workers": 1,
            "idle_timeout_minutes": IDLE_SECONDS / 60,
            "provider": provider,
            "available_node_types": node_types,
            "head_node_type": "ray.head.default",
            # Nothing is installed or copied to a fake node, but the monitor asks for every key.
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{when}_commands": [] for when in COMMANDS},
        }
        file = self.folder / "autoscaling.json"
        file.write_text(json.dumps(content))
        self.environ |= {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        names = {"RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"}
        arguments = ["--num-cpus", str(head_cpus), "--autoscaling-config", str(file)]
        self.start(HEAD, *arguments, environ=dict.fromkeys(names, FAKE_HEAD_NODE_ID))


@contextlib.contextmanager
def nodes(folder: Path, tuned: bool = False) -> Iterator[Nodes]:
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
    variables |= switches(own) if tuned else {}
    cluster = Nodes(folder, variables, f"{HEAD}:{free_port()}")
    everything = Server("", subprocess.Popen(["true"]), folder, mark)
    try:
        yield cluster
    finally:
        everything.nodes = tuple(cluster.processes)
        try:
            everything.stop()
        finally:
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
        process.wait(PATIENCE * STOP_SECONDS)
