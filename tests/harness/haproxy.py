"""HAProxy by itself, with a configuration as Ray Serve writes it: seconds where a cluster takes a minute."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deployments.front import guard as front
from deployments.front.spare import is_free
from deployments.front.switches import FAST_DATA_PLANE, haproxy_binary
from tests.harness.server import free_port, wait_for

CONFIGURATION = """global
    stats socket {folder}/admin.sock mode 600
    tune.bufsize {bufsize}
defaults
    mode http
    option abortonclose
    option splice-request
    option splice-response
    option idle-close-on-response
    option redispatch 1
    timeout connect 1s
    timeout client 60s
    timeout server {server_seconds}s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
frontend http_frontend
    bind {address}
    acl ours path_beg /v1
    use_backend ours if ours
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend ours
    server one 127.0.0.1:{behind}
"""


@contextlib.contextmanager
def haproxy(folder: Path, behind: int, host: str = "127.0.0.1", server_seconds: int = 60) -> Iterator[int]:
    """Run HAProxy with a configuration as Ray Serve writes it, amended, before a port; give its own."""
    port, config = free_port(), folder / "haproxy.cfg"
    bufsize = FAST_DATA_PLANE["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]
    address = f"{'*' if host == '::' else '127.0.0.1'}:{port}"  # where Ray Serve is told to listen
    config.write_text(
        CONFIGURATION.format(
            folder=folder, bufsize=bufsize, address=address, behind=behind, server_seconds=server_seconds
        )
    )
    front.amend(config)
    amended = config.read_text()
    front.amend(config)  # a second manager's start changes nothing more
    assert config.read_text() == amended
    binary = haproxy_binary()
    assert binary is not None
    with subprocess.Popen([binary, "-f", str(config)]) as process:
        try:
            wait_for(lambda: not is_free("127.0.0.1" if host == "::" else host, port), 10, "no HAProxy")
            yield port
        finally:
            process.kill()
