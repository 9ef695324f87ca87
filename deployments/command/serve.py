"""The tuned start: a local Ray, Serve on its fast data plane, the application, an orderly end.

The same application as under `serve run`. What differs are switches that Ray reads when it is
imported, so `prepare_environment` has to run before anything imports Ray.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from deployments.command.summary import ServeArguments, table
from deployments.config.load import load_workers
from deployments.config.worker import INGRESS_NAME, Worker
from deployments.errors import ConfigError, EngineStartError, reason_of
from deployments.front.address import bracketed, try_to_listen
from deployments.front.guard import haproxies, inner_host
from deployments.front.switches import prepare_environment, stop_guards
from deployments.machine import require_vllm
from deployments.plan.plan import ingress_replicas, make_plans, unplaceable
from deployments.tracing import objection

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION = "default"
POLL_SECONDS = 0.2
# What Serve may take to end, as by itself.
END_SECONDS = 30.0


def run(arguments: ServeArguments) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status."""
    if reason := objection():
        print(reason, file=sys.stderr)
    try:
        try_to_listen(arguments.host, arguments.port)
    except OSError as error:
        print(f"{bracketed(arguments.host)}:{arguments.port}: {error.strerror}", file=sys.stderr)
        return 1
    # A short path: Ray adds 56 characters to it, and a socket's path may have 97.
    folder = Path(tempfile.mkdtemp(prefix="embeddings-", dir="/tmp"))
    prepare_environment(folder, arguments.host)
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
    workers = load_workers(arguments.path)
    if any(worker.generator.type == "vllm" for worker in workers):
        require_vllm()
    started = time.monotonic()
    _say(started, "starting Ray")
    # Never somebody else's cluster, which we would shut down in the end.
    ray.init("local", include_dashboard=False, log_to_driver=level == "DEBUG", logging_level=logging.ERROR)
    if stop.is_set():
        return 0
    _install(stop, reload)  # Ray has put a handler of its own in the place of ours
    application = _build(arguments, workers)
    serve.start(http_options={"host": inner_host(arguments.host), "port": arguments.port})
    _deploy(application)
    failed = _watch(started, stop)
    if stop.is_set():
        return 0
    if INGRESS_NAME in failed or all(worker.name in failed for worker in workers):
        for name, reason in failed.items():
            print(f"{name}: {reason}", file=sys.stderr)
        return 1
    if not _wait_for_port(arguments, stop):
        return 0
    _say_ready(started, arguments, workers, failed)
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
    plans = make_plans(workers, machine)
    if problems := unplaceable(plans, machine):
        raise ConfigError("\n".join(problems))
    return build(
        BuildArguments(
            config=arguments.path,
            ingress_replicas=arguments.ingress_replicas or ingress_replicas(plans, machine),
            metrics_host=arguments.host,
            keys=arguments.keys,
            insecure=arguments.insecure,
            batches=arguments.batches,
            allow_origins=arguments.allow_origins,
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
        workers = load_workers(arguments.path)
        _deploy(_build(arguments, workers))
    except ConfigError as error:
        print(f"{error.message}\nnothing has changed", file=sys.stderr, flush=True)
        return
    except Exception:  # whatever it is, what runs is worth more than the change
        traceback.print_exc()
        print("nothing has changed", file=sys.stderr, flush=True)
        return
    _say_ready(started, arguments, workers, _watch(started, stop))


def _watch(started: float, stop: threading.Event) -> dict[str, str]:
    """Tell each change of a worker's state until all are up or have failed; return why those that have.

    An engine that can't start has failed at the first time: Ray Serve tries twice more, which takes minutes.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

    told: dict[str, str] = {}
    failed: dict[str, str] = {}  # Serve's message forgets the reason while it tries again
    status = ApplicationStatusOverview(ApplicationStatus.NOT_STARTED, "", 0.0, {})
    while not stop.wait(POLL_SECONDS):
        status = serve.status().applications.get(APPLICATION, status)
        for name, deployment in status.deployments.items():
            counts = ", ".join(f"{n} {state.lower()}" for state, n in deployment.replica_states.items())
            state = "ready" if _is_up(deployment) else counts or "waiting"
            if _cant_start(deployment):
                failed[name] = reason_of(deployment.message)
            if name in failed and not _is_up(deployment):
                state = f"can't start: {failed[name]}"
            line = f"{name}: {state}"
            if told.get(name) != line:
                told[name] = line
                _say(started, line)
        updating = any(
            each.status.value == "UPDATING" and name not in failed
            for name, each in status.deployments.items()
        )
        if status.deployments and not updating:
            break
    down = {name: each.message for name, each in status.deployments.items() if not _is_up(each)}
    return {name: failed.get(name) or reason_of(message) for name, message in down.items()}


def _is_up(deployment: Any) -> bool:
    """Whether a deployment serves; it does so while it scales."""
    return deployment.status.value in {"HEALTHY", "UPSCALING", "DOWNSCALING"}


def _cant_start(deployment: Any) -> bool:
    """Whether the engine of one that isn't up has said why it can't start."""
    return not _is_up(deployment) and EngineStartError.__name__ in deployment.message


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


def _say_ready(
    started: float, arguments: ServeArguments, workers: Iterable[Worker], failed: dict[str, str]
) -> None:
    _say(started, "ready" if not failed else "ready, but for the workers that failed")
    print(table(arguments, workers, failed), flush=True)


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
