"""What an operator is told once the cluster serves: models, addresses, keys."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.config.worker import Worker
from deployments.keys.file import KEYS_VARIABLE


@dataclass(frozen=True)
class ServeArguments:
    """What the command line says; zero `ingress_replicas` are as many as there are cores for."""

    config: str
    host: str
    port: int
    ingress_replicas: int
    keys: str = ""
    insecure: bool = False
    batches: str = ""


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, its cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def table(arguments: ServeArguments, workers: Iterable[Worker], failed: dict[str, str]) -> str:
    """Return what an operator wants to see first: models, addresses, keys."""
    rows = [("MODEL", "WORKER", "VERSION", "STATE")]
    for worker in workers:
        state = f"failed: {failed[worker.name]}" if worker.name in failed else "ready"
        rows += [(name, worker.name, str(worker.queue.version), state) for name in worker.queue.models]
    base = f"http://{arguments.host}:{arguments.port}"
    return "\n".join(
        [
            "",
            *columns(rows),
            "",
            f"OpenAI API  {base}/v1",
            f"Docs        {base}/docs",
            f"Keys        {_keys(arguments)}",
            f"Ray jobs    {_ray_variables()}",
            f"Batches     {_batches(arguments)}",
            f"Changes     edit the worker files, then: kill -HUP {os.getpid()}",
            "Stop        Ctrl-C",
        ]
    )


def _ray_variables() -> str:
    """Return what joins this cluster: Ray chooses its port anew at each start, and may ask for its token."""
    import ray

    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    return f"RAY_ADDRESS={ray.get_runtime_context().gcs_address} RAY_AUTH_MODE={mode}"


def _keys(arguments: ServeArguments) -> str:
    if arguments.keys or os.environ.get(KEYS_VARIABLE):
        return arguments.keys or f"from {KEYS_VARIABLE}"
    return "none set: whoever reaches this address may use it"


def _batches(arguments: ServeArguments) -> str:
    from deployments.batches.desk import default_batches

    return arguments.batches or default_batches()
