"""Starts HAProxy for Ray Serve's HAProxyManager, so that the front outlives the manager.

Ray ends a dead worker's process group, and HAProxy with it; the next manager starts one that knows no
application yet and answers 404. Here HAProxy gets a session of its own, and the next manager's takes over
its listeners and its configuration until that manager has heard of the applications.

Runs as a program of its own, in the place of HAProxy's: it imports nothing but the standard library.
"""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

# What a client may take for its headers; the body's time is bounded behind us.
HEADER_SECONDS = 10


def haproxies(config: str) -> list[int]:
    """Return the HAProxy processes whose configuration's path contains the text."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            arguments = each.joinpath("cmdline").read_text().split("\0")
        except OSError:
            continue
        path = arguments[arguments.index("-f") + 1] if "-f" in arguments[:-1] else ""
        if "haproxy" in arguments[0] and config in path:
            found.append(int(each.name))
    return found


def answers(path: str) -> bool:
    """Return whether an HAProxy listens on that admin socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


def command(arguments: list[str]) -> list[str]:
    """Return the arguments for HAProxy; those of a manager's first start take over from a survivor."""
    config = Path(arguments[arguments.index("-f") + 1])
    kept = config.with_suffix(".kept")
    if "-sf" not in arguments and kept.exists() and (survivors := haproxies(str(config))):
        admin = next(line.split()[2] for line in kept.read_text().splitlines() if "stats socket" in line)
        if answers(admin):
            shutil.copy(kept, config)
            arguments = [*arguments, "-sf", *map(str, survivors), "-x", admin]
    bound_headers(config)
    shutil.copy(config, kept)
    return arguments


def bound_headers(config: Path) -> None:
    """Let HAProxy give up on a request whose headers don't come; Ray Serve has no switch for that.

    The time between two requests of a connection would be bounded by it too, where nothing else is said.
    """
    text = config.read_text()
    if "timeout http-request" not in text and (place := re.search(r"^( *)timeout client (.*)\n", text, re.M)):
        indent, idle = place.groups()
        lines = f"{indent}timeout http-request {HEADER_SECONDS}s\n"
        if "timeout http-keep-alive" not in text:
            lines += f"{indent}timeout http-keep-alive {idle}\n"
        config.write_text(text[: place.end()] + lines + text[place.end() :])


def write_program(folder: Path, binary: str) -> Path:
    """Write the program that Ray Serve starts as HAProxy, and return its path."""
    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{binary}" "$@"\n')
    program.chmod(0o700)
    return program


if __name__ == "__main__":
    binary, *rest = sys.argv[1:]
    rest = command(rest)
    os.setsid()
    os.execv(binary, [binary, *rest])  # noqa: S606 - what Ray Serve itself would start
