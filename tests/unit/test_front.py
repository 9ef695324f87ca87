"""HAProxy's guard, around a program that ends as soon as it has started; and what HAProxy itself answers."""

import itertools
import os
import socket
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from deployments.front import guard as front
from tests.harness.haproxy import haproxy
from tests.harness.server import free_port, wait_for


def starts(log: Path) -> list[float]:
    """Return when the program was started."""
    return [float(line) for line in log.read_text().split()] if log.exists() else []


def test_what_cant_start_is_started_after_pauses_that_grow(tmp_path: Path) -> None:
    """Twice as long each time; when the server ends, so does the guard."""
    log, config = tmp_path / "log", tmp_path / "haproxy.cfg"
    program = tmp_path / "haproxy"
    program.write_text(f"#!/bin/sh\ndate +%s.%N >> {log}\n")
    program.chmod(stat.S_IRWXU)
    config.write_text(f"    stats socket {tmp_path}/admin.sock mode 600\n    timeout client 60s\n")
    with subprocess.Popen(["sleep", "600"]) as server:
        command = [sys.executable, "-S", "-E", front.__file__, str(server.pid), str(program)]
        subprocess.run([*command, "-f", str(config)], check=True)
        wait_for(lambda: len(starts(log)) >= 5, 30, lambda: str(starts(log)))
        pauses = [b - a for a, b in itertools.pairwise(starts(log))]
        for number, pause in enumerate(pauses[:4]):
            assert pause >= front.FIRST_PAUSE_SECONDS * 2 ** (number + 1)
        server.kill()
        server.wait()
    wait_for(lambda: not guards(config), 30, lambda: str(guards(config)))


def guards(config: Path) -> list[int]:
    """Return the processes that were started with a configuration."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if str(config) in each.joinpath("cmdline").read_text() and int(each.name) != os.getpid():
                found.append(int(each.name))
        except OSError:
            continue
    return found


# --- what HAProxy says itself --------------------------------------------------------------------


def say(port: int, text: bytes, host: str = "127.0.0.1", ends: bool = False) -> httpx.Response:
    """Send bytes as they are, perhaps with no more to come, and return the answer."""
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(text)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


def told(response: httpx.Response, status: int, code: str) -> str:
    """Hold an answer of HAProxy's own against the contract; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    error = body["error"]
    assert (body["code"], error["code"], error["param"]) == (code, code, None)
    assert list(error) == ["message", "type", "param", "code"]
    return str(error["message"])


def head(size: int, name: str = "Authorization") -> bytes:
    """Return a request's head with a header of that size."""
    return f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{name}: {'x' * size}\r\n\r\n".encode()


def test_what_haproxy_says_itself_is_json(tmp_path: Path) -> None:
    """A head that is too large, a path of nobody's, a process that is gone or silent."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        haproxy(tmp_path, silent.getsockname()[1], server_seconds=1) as port,
    ):
        for text in (
            head(20_000),
            head(60_000, "Cookie"),
            b"GET /v1/" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        ):
            message = told(say(port, text), 431, "head_too_large")
            assert message == "the request's head is larger than 17 KiB"
        message = told(
            say(port, b"GET /other HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), 404, "not_found"
        )
        assert message == "no application is served under this path, or none yet"
        for text in (
            b"GET /v1/models HTTP/1.1\r\nno header\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost: a b\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabc",
            b"hello\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
            head(70_000),
        ):
            for ends in (False, True):
                response = say(port, text, ends=ends)
                assert told(response, 400, "invalid_request") == "the request's head isn't HTTP"
            assert response.headers["x-request-id"]
        top = b" /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        response = say(port, b"GET" + top + b"X-Y: a\x01b\r\n\r\n")
        assert told(response, 400, "invalid_request") == "the request's head isn't HTTP"
        # It took the request, and says nothing: 504 in HAProxy's words.
        response = say(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert told(response, 503, "model_unavailable") == "the process that had this request doesn't answer"
        assert response.headers["retry-after"] == "1"
    gone = free_port()
    with haproxy(tmp_path, gone) as port:
        response = say(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert told(response, 503, "model_unavailable") == "no process takes requests now"


class Echo(BaseHTTPRequestHandler):
    """Says how large a head was that came through."""

    def do_GET(self) -> None:
        """Answer with the size of the headers."""
        body = str(sum(map(len, self.headers.values()))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base has it
        """Say nothing."""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "::"])
def test_a_head_of_16_kib_passes(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one header or in many; on IPv4, on IPv6, and with `::` on both."""
    monkeypatch.setenv(front.HOST_VARIABLE, host)
    many = "".join(f"X-{number}: {'y' * 60}\r\n" for number in range(95))
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with haproxy(tmp_path, server.server_port, host) as port:
            for address in {"::": ("127.0.0.1", "::1")}.get(host, (host,)):
                for text in (
                    head(16 * 1024),
                    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{many}\r\n".encode(),
                ):
                    assert say(port, text, address).status_code == 200
        server.shutdown()


class Headers(Echo):
    """Says which headers came through."""

    def do_GET(self) -> None:
        """Answer with their names."""
        body = ",".join(sorted(map(str.lower, self.headers))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_what_ray_serve_would_end_a_request_for_doesnt_come_through(tmp_path: Path) -> None:
    """Bytes in its own headers that aren't ASCII; an offer to speak another protocol."""
    with HTTPServer(("127.0.0.1", 0), Headers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with haproxy(tmp_path, server.server_port) as port:
            top = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Other: \xe9\r\nConnection: close\r\n"
            for odd in (b"X-Request-Id: caf\xe9", b"X-Session-Id: \xff", b"Upgrade: foo"):
                assert {"x-request-id", "x-session-id", "upgrade"}.isdisjoint(
                    say(port, top + odd + b"\r\n\r\n").text.split(",")
                )
            assert "x-request-id" in say(port, top + b"X-Request-Id: mine\r\n\r\n").text
        server.shutdown()
