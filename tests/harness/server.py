"""Starts the real server as a user does, and ends it; knows every process that belongs to it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from deployments.front.switches import free_ports

# A limit ends what hangs, and costs what is fast nothing: it is for a machine so many times slower than that
# on which the seconds below and at the callers were set.
PATIENCE = 5
START_SECONDS = 180
STOP_SECONDS = 60
MARK = "EMBEDDING_CLUSTER_TEST"


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    return free_ports(1)[0]


def wait_for(condition: Callable[[], object], seconds: float, what: str | Path | Callable[[], str]) -> None:
    """Wait until the condition holds; fail with `what`, or what that file holds, after so many seconds.

    That is on a quick machine: nothing follows from how long it takes.
    """
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            told = what.read_text() if isinstance(what, Path) else what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds} s: {told}")
        time.sleep(0.05)


@dataclass
class Server:
    """A running server. `processes` finds all that it started, by a mark in their environment."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    metrics_port: int = 0
    nodes: tuple[subprocess.Popen[bytes], ...] = ()  # the head first

    def processes(self) -> list[psutil.Process]:
        """Return the live processes that inherited this server's environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def titled(self, title: str) -> list[psutil.Process]:
        """Return those whose title holds the text, as `ServeReplica:default:NAME`, by number."""
        found = []
        for process in sorted(self.processes(), key=lambda each: each.pid):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _left(self) -> str:
        """Say what is still running."""
        lines = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                lines.append(f"{process.pid}: {' '.join(process.cmdline())}")
        return "\n".join(["no process left", *lines])

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ask it to end, and wait until nothing of it is left."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE * STOP_SECONDS)
            for node in reversed(self.nodes):
                node.terminate()
                node.wait(PATIENCE * STOP_SECONDS)
            # What Ray starts beside a raylet asks once a minute at worst whether the head is still there.
            wait_for(lambda: not self.processes(), 2 * STOP_SECONDS, self._left)
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()


@contextlib.contextmanager
def serve(
    config: Path,
    folder: Path,
    environ: Mapping[str, str] | None = None,
    tuned: bool = True,
    ingress_replicas: int = 1,
    keys: Path | None = None,
    until: Callable[[str], bool] | None = None,
) -> Iterator[Server]:
    """Serve a worker file or folder until the block ends; `folder` gets the log, `keys` is a key file.

    The block begins as soon as `until` holds of the address: without it, as every model answers.
    `tuned` means `embedding-cluster serve`; otherwise Ray's own `serve run` builds the application from
    a YAML file, which is where a port can be given to it, inside the cluster as under `serve deploy`.
    """
    port, mark = free_port(), uuid.uuid4().hex
    url = f"http://127.0.0.1:{port}"
    command = [
        program("embedding-cluster"),
        "serve",
        "--port",
        str(port),
        "--ingress-replicas",
        str(ingress_replicas),
        *(["--keys", str(keys)] if keys else []),
        str(config),
    ]
    if not tuned:
        command = [program("serve"), "run", str(deploy_file(config, folder, port, ingress_replicas))]
    log = folder / f"server-{port}.log"
    # `serve run` joins the cluster that Ray's folder names, be it somebody else's or long gone. A short path:
    # Ray adds 56 characters to it, and a socket's path may have 97.
    own = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    variables = {
        **os.environ,
        MARK: mark,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(own),
        "XDG_DATA_HOME": str(own / "data"),  # a storage of batches is one server's alone
        **(environ or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    server = Server(url, process, log, mark)
    try:
        begins = until or is_ready
        wait_for(lambda: process.poll() is not None or begins(url), START_SECONDS, log)
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        try:
            server.stop(signal.SIGINT if tuned else signal.SIGTERM)  # `serve run` has no use for SIGINT here
            # As Ray tells of a call that the controller ended under.
            assert not tuned or "graceful_shutdown failed" not in log.read_text(), log.read_text()
        finally:
            shutil.rmtree(own, ignore_errors=True)


def program(name: str) -> str:
    """Return the path of a command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def deploy_file(config: Path, folder: Path, port: int, ingress_replicas: int) -> Path:
    """Write a file for `serve run` and `serve deploy`; the one proxy is on the head node."""
    application = {
        "import_path": "deployments.app:build",
        "args": {"config": str(config), "ingress_replicas": ingress_replicas},
    }
    content = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    file = folder / f"serve-{port}.yaml"
    file.write_text(json.dumps(content))
    return file


def is_ready(url: str, path: str = "/ready") -> bool:
    """Return whether every model answers; with another path, whether that does."""
    try:
        return httpx.get(f"{url}{path}", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False
