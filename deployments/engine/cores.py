"""CPU replicas own their cores: a core is claimed by a lock that dies with its holder."""

import fcntl
import os
import tempfile
import time
from pathlib import Path

from deployments.errors import EngineStartError

WAIT_SECONDS = 30.0  # what a replica that is being replaced may take to let go


class CoreClaim:
    """Cores of this node that no other claim holds, from `claim` until `release` or the process's end.

    The kernel drops the locks of a process that dies, however it dies.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        """Prepare to claim `count` cores."""
        self._count = count
        user = os.getuid()
        self._folder = folder or Path(tempfile.gettempdir(), f"embedding-cluster-cores-{user}")
        self._locks: dict[int, int] = {}

    def claim(self, wait_seconds: float = WAIT_SECONDS) -> list[int]:
        """Return the numbers of the cores. Raises EngineStartError when too few become free."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        cores = sorted(os.sched_getaffinity(0))
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
        for core in cores:
            descriptor = os.open(self._folder / f"{core}.lock", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            self._locks[core] = descriptor
            if len(self._locks) == self._count:
                return True
        self.release()  # a part of the cores would only keep others from theirs
        return False

    def release(self) -> None:
        """Let go of all cores."""
        while self._locks:
            _, descriptor = self._locks.popitem()
            os.close(descriptor)
