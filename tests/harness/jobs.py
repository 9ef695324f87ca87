"""Jobs beside a test server: its cluster's address, and the command that embeds."""

import os
import re
import subprocess
from pathlib import Path

from tests.harness.server import Server, program, wait_for


def environ(address: str) -> dict[str, str]:
    """Return what a process needs to join a test server's cluster."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}


def address_of(server: Server) -> str:
    """Return the address that the tuned server prints."""
    wait_for(lambda: "RAY_ADDRESS=" in server.log.read_text(), 30, server.log)
    found = re.search(r"RAY_ADDRESS=(\S+)", server.log.read_text())
    assert found is not None
    return found[1]


def start_job(address: str, source: Path, output: Path, *more: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start `embedding-cluster embed`."""
    command = [program("embedding-cluster"), "embed", str(source), str(output), *more]
    with log.open("ab") as target:
        return subprocess.Popen(command, env=environ(address), stdout=target, stderr=target)
