"""HAProxy's guard, around a program that ends as soon as it has started."""

import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

from deployments.front import guard as front
from tests.harness.server import wait_for


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
