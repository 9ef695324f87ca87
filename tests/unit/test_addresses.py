"""Where we listen and whom we ask for a connection: IPv4, IPv6 and names."""

import asyncio
import socket
from pathlib import Path

import httpx
import pytest

from deployments.command.summary import ServeArguments, table
from deployments.config.load import load_workers
from deployments.config.worker import Monitoring
from deployments.errors import ConfigError
from deployments.front.address import family_of, try_to_listen
from deployments.front.spare import is_free
from deployments.http.metrics_port import MetricsPort
from deployments.replica.replica import Replica
from tests.harness import workers
from tests.harness.server import free_port, wait_for


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_a_port_that_is_taken_is_told_on_each_kind_of_address(host: str) -> None:
    """And one that is free is found so."""
    port = free_port()
    try_to_listen(host, port)
    with (
        socket.create_server((host, port), family=family_of(host)),
        pytest.raises(OSError, match="Address already in use"),
    ):
        try_to_listen(host, port)


async def test_a_name_may_mean_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` does on machines that have nothing else."""
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0))]
    )
    assert family_of("localhost") is socket.AF_INET6


@pytest.mark.parametrize("probe", ["localhost:9", "10.0.0.1:65535", "[::1]:9", "[fe80::1%eth0]:80"])
def test_probes_name_a_host_and_a_port(probe: str) -> None:
    """An IPv6 address in brackets, as in a URL."""
    assert Monitoring(tcp_probes=(probe,)).tcp_probes == (probe,)


@pytest.mark.parametrize("probe", ["::1:9", "[::1]", "[]:9", "[::1]9", "::1"])
def test_an_address_without_brackets_is_refused(tmp_path: Path, probe: str) -> None:
    """Nobody knows where it ends and the port begins."""
    file = tmp_path / "m.toml"
    file.write_text(workers.fake("m", more=f'[monitoring]\ntcp_probes = ["{probe}"]'))
    with pytest.raises(ConfigError, match=r"monitoring\.tcp_probes"):
        load_workers(file)


async def test_a_probe_of_ipv6_is_waited_for() -> None:
    """Until it accepts."""
    asked = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer.get_extra_info("peername")[0])
        writer.close()

    server = await asyncio.start_server(accept, "::1", 0)
    port = server.sockets[0].getsockname()[1]

    class Plan:
        """What the waiting looks at."""

        name = "m"

        class worker:  # noqa: N801
            """Its worker file."""

            monitoring = Monitoring(tcp_probes=(f"[::1]:{port}",))

    replica = Replica.__new__(Replica)
    replica._plan = Plan  # type: ignore[assignment]
    await asyncio.wait_for(replica._await_probes(), 10)
    server.close()
    assert asked == ["::1"]


async def test_a_metrics_port_opens_on_ipv6(tmp_path: Path) -> None:
    """Where the server listens there."""
    file, port = tmp_path / "m.toml", free_port()
    file.write_text(workers.fake("m", more=f"[monitoring]\nmetrics_port = {port}"))
    (worker,) = load_workers(file)

    async def gather() -> list[bytes]:
        return [b""]

    opened = MetricsPort(worker, "::1", gather)
    opened.open()
    await asyncio.to_thread(wait_for, lambda: not is_free("::1", port), 10, "no metrics port")
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://[::1]:{port}/metrics")
    assert answer.status_code == 200
    opened.close()


def test_an_operator_is_shown_urls_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets around IPv6."""
    monkeypatch.setattr("deployments.command.summary._ray_variables", str)
    assert "http://[::1]:8000/v1" in table(ServeArguments("", "::1", 8000, 1), (), {})
    assert "http://localhost:8000/v1" in table(ServeArguments("", "localhost", 8000, 1), (), {})
