"""What an operator is told once the cluster serves: models, addresses, keys."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.config.worker import Worker
from deployments.front.address import bracketed
from deployments.keys.file import KEYS_VARIABLE
from deployments.plan.plan import WorkerPlan
from deployments.plan.sharing import advice

# No line is broken: whoever wants that has a terminal that does it.
WIDTH = 10_000


@dataclass(frozen=True)
class ServeArguments:
    """What the command line says; zero `ingress_replicas` are as many as there are cores for."""

    path: str
    host: str
    port: int
    ingress_replicas: int
    keys: str = ""
    insecure: bool = False
    batches: str = ""
    allow_origins: str = ""


def table(arguments: ServeArguments, workers: Iterable[Worker], failed: dict[str, str]) -> str:
    """Return what an operator wants to see first: models, addresses, keys."""
    rows = [("MODEL", "WORKER", "VERSION", "STATE")]
    for worker in workers:
        state = f"failed: {failed[worker.name]}" if worker.name in failed else "ready"
        rows += [(name, worker.name, str(worker.queue.version), state) for name in worker.queue.models]
    base = f"http://{bracketed(arguments.host)}:{arguments.port}"
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


def plan_table(plans: Iterable[WorkerPlan]) -> str:
    """Return what would be deployed, a line for each worker, and below what there is to say of it."""
    heads = ("WORKER", "MODELS", "ENGINE", "DEVICE", "RANKS", "REPLICAS", "EACH TAKES", "MAX LENGTH")
    rows, notes = [heads], []
    for plan in plans:
        wanted, scaling = plan.worker.generator, plan.worker.deployment.autoscaling
        most = f"{plan.min_replicas} to {scaling.max_replicas}" if scaling else str(plan.min_replicas)
        takes = [f"{plan.total(kind):g} {kind}" for kind in ("CPU", "GPU") if plan.total(kind)]
        ranks = f"{wanted.tensor_parallel_size} x {wanted.pipeline_parallel_size}"
        length = str(wanted.max_model_len or "the model's")
        models = ", ".join(plan.worker.queue.models)
        rows.append((plan.name, models, plan.engine, plan.device, ranks, most, ", ".join(takes), length))
        notes.append(f"{plan.name}: {plan.engine}: {plan.engine_reason}; {wanted.model_path}")
        if plan.tokens_that_fill and wanted.world_size == 1:
            notes.append(f"{plan.name}: {advice(plan.tokens_that_fill)}")
    return "\n".join([*columns(rows), "", *notes])


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a line for each row, its cells in columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table, soft_wrap=True)
    return [line.rstrip() for line in captured.get().splitlines()]


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
