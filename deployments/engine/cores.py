"""CPU replicas own their cores: a core is claimed by a lock that dies with its holder.

Ray may be told of more CPUs than a node has cores. As many replicas as it then places share them, each
core among no more than it must.
"""

import contextlib
import fcntl
import logging
import math
import os
import stat
import tempfile
import time
from pathlib import Path

from deployments.errors import EngineStartError
from deployments.machine import cores_here, own_cores

logger = logging.getLogger("ray.serve")

WAIT_SECONDS = 30.0  # what a replica that is being replaced may take to let go


def sharers(ray_cpus: float) -> int:
    """Return how many replicas share a core of this node, for which Ray counts so many CPUs."""
    return max(1, math.ceil(ray_cpus / cores_here()))


def _own_folder() -> Path:
    """Return where all of this user's replicas on this node keep their locks, and nobody else's.

    Anybody may have made a folder of that name, or a link, in a place that everybody can write to.
    """
    user = os.getuid()
    for place in (Path(tempfile.gettempdir()), Path.home() / ".cache"):
        folder = place / f"embedding-cluster-cores-{user}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077:
                return folder
            logger.warning("%s isn't this user's own folder", folder)
    raise EngineStartError("there is no folder for the locks of cores that is this user's own")


class CoreClaim:
    """Cores of this node, from `claim` until `release` or the process's end.

    No other claim holds them, unless all claims are made for `shared_by` more than one.
    The kernel drops the locks of a process that dies, however it dies.
    """

    def __init__(self, count: int, folder: Path | None = None, shared_by: int = 1) -> None:
        """Prepare to claim `count` cores, each of which may have `shared_by` holders."""
        self._count = count
        self._shared_by = shared_by
        self._folder = folder or _own_folder()
        self._locks: dict[int, int] = {}

    def claim(self, wait_seconds: float = WAIT_SECONDS) -> list[int]:
        """Return the numbers of the cores. Raises EngineStartError when too few become free."""
        cores = own_cores()
        if self._count > len(cores):
            raise EngineStartError(
                f"the worker asks for {self._count} cores and its node has {len(cores)};"
                " lower deployment.num_cpus"
            )
        deadline = time.monotonic() + wait_seconds
        while not self._try(cores):
            if time.monotonic() > deadline:
                raise EngineStartError(
                    f"{self._count} of this node's {len(cores)} cores are needed, and other replicas"
                    " hold too many; lower deployment.num_cpus or the number of replicas"
                )
            time.sleep(0.1)
        return sorted(self._locks)

    def _try(self, cores: list[int]) -> bool:
        for holder in range(self._shared_by):
            for core in cores:
                if core in self._locks or not self._lock(core, holder):
                    continue
                if holder:
                    logger.warning(
                        "core %d is shared with %d other replicas: Ray counts more CPUs than there are",
                        core,
                        holder,
                    )
                if len(self._locks) == self._count:
                    return True
        self.release()  # a part of the cores would only keep others from theirs
        return False

    def _lock(self, core: int, holder: int) -> bool:
        """Become a core's first holder, or its second, and so on; say whether that place was free."""
        name = f"{core}.{holder}.lock" if holder else f"{core}.lock"
        descriptor = os.open(self._folder / name, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._locks[core] = descriptor
        return True

    def release(self) -> None:
        """Let go of all cores."""
        while self._locks:
            _, descriptor = self._locks.popitem()
            os.close(descriptor)
