"""Starts each contestant at its best settings on this machine, and ends it.

The engine's settings are the same for all that have one: what differs is how texts get to it and vectors
back. Processes are found by a mark in their environment, which is how `tests.server` does it too.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.sender import Result, Task, send
from benchmarks.subjects import Subject, engine_environment
from benchmarks.workloads import DIMENSION, MODEL, Workload
from deployments.front.switches import prepare_environment
from tests.harness.server import MARK, STOP_SECONDS, Server, free_port, serve, wait_for

ROOT = Path(__file__).parent.parent
# Environments of the rivals' own, made once.
ENVIRONMENTS = Path(__file__).parent / ".environments"
START_SECONDS = 240
LINGER_SECONDS = 10
POLL_SECONDS = 0.05
CACHE_MIB = 64
# Stands before the installed packages where a server doesn't ask for pandas: `make setup` doesn't install it,
# the tests do, and Ray Serve's processes import it where it is there.
WITHOUT_PANDAS = {"PYTHONPATH": str(Path(__file__).parent / "without_pandas")}
# ray.serve.llm imports these; ray[llm] itself would bring another vLLM.
RAY_LLM_PACKAGES = ("pyarrow==26.0.1", "pandas==3.1.1", "jsonref==1.1.0")

Send = Callable[[Workload, float, float, str], Result]


@dataclass(frozen=True)
class Running:
    """A contestant that answers: the seconds to its first embedding, its processes, and a way to ask it."""

    seconds: float
    server: Server
    send: Send

    def processes(self) -> list[psutil.Process]:
        """Return its processes. One that sets its title writes over its mark; its parent still has one."""
        found = {process.pid: process for process in self.server.processes()}
        for process in list(found.values()):
            with contextlib.suppress(psutil.Error):
                found |= {child.pid: child for child in process.children(recursive=True)}
        return list(found.values())

    def pss(self) -> int:
        """Return the memory of all its processes in bytes, what is shared divided up."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def cpu_seconds(self) -> float:
        """Return the CPU time that its processes have had."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@dataclass(frozen=True)
class Contestant:
    """A name for the table, what it is, and how it is started; `folder` is its own and is removed later.

    A `library` gives arrays: it isn't asked for base64. A `cached` contestant is asked what a cache is for.
    """

    name: str
    what: str
    start: Callable[[Path, Subject], "contextlib.AbstractContextManager[Running]"]
    cached: bool = False
    library: bool = False
    on_gpus: bool = False

    def takes(self, workload: Workload) -> bool:
        """Whether it is asked for a workload."""
        if self.library and workload.encoding_format == "base64":
            return False
        return workload.cached or not self.cached


# --- processes -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(
    command: list[str], folder: Path, environ: Mapping[str, str], url: str = "", **options: Any
) -> Iterator[Server]:
    """Run a command until the block ends; all that it starts carries its mark."""
    mark, log = uuid.uuid4().hex, folder / "log"
    # A short path: Ray adds 56 characters to it, and a socket's path may have 97.
    own = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    variables = {**os.environ, MARK: mark, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(own), **environ}
    with log.open("wb") as output:
        options = {"stdout": output, **options}
        started = subprocess.Popen(
            command, stderr=output, env=variables, cwd=ROOT, start_new_session=True, **options
        )
    server = Server(url, started, log, mark)
    try:
        yield server
    finally:
        try:
            started.terminate()
            started.wait(STOP_SECONDS)
            # ray.serve.llm leaves its HAProxy behind.
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not server.processes(), LINGER_SECONDS, "processes are left")
        finally:
            for each in server.processes():
                with contextlib.suppress(psutil.Error):
                    each.kill()
            shutil.rmtree(own, ignore_errors=True)


def first_embedding(server: Server, model: str = MODEL) -> None:
    """Wait until it embeds."""
    body = {"model": model, "input": "the first text"}

    def embeds() -> bool:
        if server.process.poll() is not None:
            raise RuntimeError(server.log.read_text()[-4000:])
        try:
            answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    wait_for(embeds, START_SECONDS, server.log)


def asking(server: Server, dimension: int = DIMENSION) -> Send:
    """Return how a server is sent a workload."""

    def ask(workload: Workload, seconds: float, warm_up: float, reference: str) -> Result:
        return send(Task(server.url, asdict(workload), seconds, warm_up, reference, dimension))

    return ask


@contextlib.contextmanager
def http(
    command: list[str], folder: Path, environ: Mapping[str, str], port: int, subject: Subject
) -> Iterator[Running]:
    """Run an HTTP server."""
    begun = time.monotonic()
    with process(command, folder, environ, f"http://127.0.0.1:{port}") as server:
        first_embedding(server, subject.name)
        yield Running(time.monotonic() - begun, server, asking(server, subject.dimension))


# --- the contestants ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(folder: Path, subject: Subject, tuned: bool = True, cache: bool = False) -> Iterator[Running]:
    """Start our server: `embedding-cluster serve`, or plain `serve run`."""
    config = folder / f"{subject.name}.toml"
    more = f"\n[limits]\ncache_mib = {CACHE_MIB}\n" if cache else ""
    config.write_text(subject.worker_file.read_text() + more)
    begun = time.monotonic()
    with serve(config, folder, WITHOUT_PANDAS, tuned=tuned) as server:
        first_embedding(server, subject.name)
        yield Running(time.monotonic() - begun, server, asking(server, subject.dimension))


def vllm_server(folder: Path, subject: Subject) -> "contextlib.AbstractContextManager[Running]":
    """Start vLLM's own server with the same engine settings."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", subject.folder]
    command += ["--served-model-name", subject.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log", "--no-enable-log-requests", "--disable-log-stats"]
    skipped = {"tensor_parallel_size", "pipeline_parallel_size"}
    for name, value in subject.engine_settings().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif name not in skipped:
            command += [f"--{flag}", str(value)]
    return http(command, folder, engine_environment(subject) | WITHOUT_PANDAS, port, subject)


def ray_serve_llm(
    folder: Path, subject: Subject, tuned: bool
) -> "contextlib.AbstractContextManager[Running]":
    """Start ray.serve.llm's OpenAI application, on Ray Serve's defaults or on the fast data plane."""
    packages = ENVIRONMENTS / "ray-llm"
    if not packages.exists():
        uv(
            "pip",
            "install",
            "--python",
            sys.executable,
            "--no-deps",
            "--target",
            str(packages),
            *RAY_LLM_PACKAGES,
        )
    port = free_port()
    settings = {**subject.engine_settings(), "disable_log_stats": True}
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        settings.pop(name)
    arguments = {
        "port": port,
        "model": subject.name,
        "folder": subject.folder,
        "gpu": bool(subject.gpus),
        "settings": settings,
        "environment": engine_environment(subject),
        "tuned": tuned,
    }
    command = [sys.executable, "-m", "benchmarks.ray_llm", json.dumps(arguments)]
    environ = {"PYTHONPATH": f"{ROOT}:{packages}", "RAY_USAGE_STATS_ENABLED": "0"}
    if tuned:
        before = dict(os.environ)
        prepare_environment(folder)  # sets what our own tuned start sets
        environ |= {name: value for name, value in os.environ.items() if before.get(name) != value}
        os.environ.clear()
        os.environ.update(before)
    return http(command, folder, environ, port, subject)


def infinity(folder: Path, subject: Subject) -> "contextlib.AbstractContextManager[Running]":
    """Start Infinity with its torch engine, in an environment of its own."""
    environment = ENVIRONMENTS / "infinity"
    if not environment.exists():
        uv("venv", "--python", sys.executable, str(environment))
        requirements = str(ROOT / "requirements" / "infinity.txt")
        uv("pip", "install", "--python", str(environment / "bin" / "python"), "--no-deps", "-r", requirements)
    port = free_port()
    command = [str(environment / "bin" / "infinity_emb"), "v2", "--model-id", subject.folder]
    command += ["--served-model-name", subject.name, "--engine", "torch", "--device", "cpu"]
    command += ["--dtype", str(subject.engine_settings()["dtype"])]
    command += ["--no-bettertransformer", "--batch-size", "64", "--no-model-warmup"]
    command += ["--url-prefix", "/v1", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    environ = {**engine_environment(subject), "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return http(command, folder, environ, port, subject)


@contextlib.contextmanager
def in_process(folder: Path, subject: Subject, which: str) -> Iterator[Running]:
    """Start `benchmarks.inprocess`, which is told what to do by lines of JSON."""
    told = json.dumps({**asdict(subject), "worker_file": str(subject.worker_file)})
    command = [sys.executable, "-m", "benchmarks.inprocess", which, told]
    begun = time.monotonic()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with process(command, folder, engine_environment(subject) | WITHOUT_PANDAS, **pipes) as server:
        lines: Any = server.process.stdin  # as text
        said: Any = server.process.stdout

        def answer() -> Any:
            while line := str(said.readline()):
                if line.startswith("{"):
                    return json.loads(line)
            raise RuntimeError(server.log.read_text()[-4000:])

        def ask(workload: Workload, seconds: float, warm_up: float, reference: str) -> Result:
            task = json.dumps(
                asdict(Task("", asdict(workload), seconds, warm_up, reference, subject.dimension))
            )
            lines.write(f"{task}\n")
            lines.flush()
            return Result(**answer())

        answer()
        yield Running(time.monotonic() - begun, server, ask)


def uv(*arguments: str) -> None:
    """Run uv, which `make` has installed."""
    subprocess.run([str(Path(sys.executable).with_name("uv")), *arguments], check=True)


US = "us, `embedding-cluster serve`"
US_PLAIN = "us, `serve run`"
US_CACHED = f"us, with a cache of {CACHE_MIB} MiB"
ENGINE = "engine alone, in process"
VLLM = "vLLM's server"
RAY_LLM = "ray.serve.llm, defaults"
RAY_LLM_TUNED = "ray.serve.llm, tuned"
INFINITY = "Infinity"
TRANSFORMERS = "sentence-transformers, in process"

CONTESTANTS = (
    Contestant(US, "HAProxy, gRPC between replicas", ours, on_gpus=True),
    Contestant(VLLM, "api_server, tuned, orjson", vllm_server, on_gpus=True),
    Contestant(
        ENGINE,
        "token ids in, vectors out",
        partial(in_process, which="engine"),
        library=True,
        on_gpus=True,
    ),
    Contestant(US_PLAIN, "Ray Serve's defaults", partial(ours, tuned=False), on_gpus=True),
    Contestant(RAY_LLM, "build_openai_app", partial(ray_serve_llm, tuned=False), on_gpus=True),
    Contestant(
        RAY_LLM_TUNED, "with HAProxy and throughput flags", partial(ray_serve_llm, tuned=True), on_gpus=True
    ),
    Contestant(INFINITY, "0.0.78, torch engine", infinity),
    Contestant(TRANSFORMERS, "a library", partial(in_process, which="sentence-transformers"), library=True),
    Contestant(US_CACHED, "as the first, with the exact cache", partial(ours, cache=True), cached=True),
)
