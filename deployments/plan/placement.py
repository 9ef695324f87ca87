"""Where replicas and their ranks run: device, cores, bundles, and what each takes from Ray."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deployments.config.worker import Worker

Device = Literal["cpu", "gpu"]
DEVICES: tuple[Device, ...] = ("cpu", "gpu")
MAX_CORES_PER_RANK = 16  # small encoders gain nothing from more
# How many of its products oneDNN keeps prepared, by their sizes. Each takes a quarter of a MiB, and lies
# between buffers that come and go: with its own number, 1,024, the engine grows by 300 to 400 MiB more. Few
# steps have the sizes of an earlier one; what this costs are 5 to 12% of those with 2 to 8 short texts.
ONEDNN_PRIMITIVES = 256
# How long OpenMP's threads spin for their next piece of work. That covers the pauses between a model's
# operations; between steps they leave the cores to the rest of the server.
OPENMP_SPIN = "100us"


@dataclass(frozen=True)
class Machine:
    """What there is to share out: cores and GPUs in all, and the cores of the largest node."""

    cpus: int
    gpus: int
    cpus_per_node: int


def device_of(worker: Worker, machine: Machine) -> Device:
    """Return what a worker computes on."""
    if worker.generator.type == "fake":
        return "cpu"
    if worker.deployment.num_gpus is None:
        return "gpu" if machine.gpus else "cpu"
    return "gpu" if worker.deployment.num_gpus else "cpu"


def needs_cores(worker: Worker, device: Device) -> bool:
    """Whether a worker's ranks compute on cores of their own."""
    return device == "cpu" and worker.generator.type != "fake"


def cores_of_ranks(workers: tuple[Worker, ...], devices: Mapping[str, Device], machine: Machine) -> int:
    """Cores for each CPU rank that names no number: what the others leave, divided evenly, at least one."""
    sharing = [w for w in workers if needs_cores(w, devices[w.name]) and not w.deployment.num_cpus]
    others = [w for w in workers if w not in sharing]
    taken = sum(replica_cores(w, devices[w.name]) * w.deployment.max_replicas for w in others)
    ranks = sum(w.generator.world_size * w.deployment.max_replicas for w in sharing)
    largest = max((w.generator.world_size for w in sharing), default=1)
    even = (machine.cpus - taken) // ranks if ranks else 1
    return max(1, min(even, machine.cpus_per_node // largest, MAX_CORES_PER_RANK))


def replica_cores(worker: Worker, device: Device) -> int:
    """Cores of one replica that names its number, or whose ranks compute on GPUs."""
    if worker.generator.type == "fake":
        return worker.deployment.num_cpus or 0
    ranks = worker.generator.world_size if device == "cpu" else 1
    return ranks * (worker.deployment.num_cpus or 1)


def spans_nodes(worker: Worker) -> bool:
    """Whether the ranks of one replica may lie on several nodes."""
    return worker.deployment.placement_group_strategy == "PACK" and worker.generator.world_size > 1


def bundles_of(worker: Worker, device: Device, cores: int) -> tuple[dict[str, float], ...]:
    """Return the placement group's bundles of one replica; none where Ray places it by itself."""
    ranks, wanted = worker.generator.world_size, worker.deployment
    if worker.generator.type == "fake" or wanted.max_replicas_per_node:
        return ()  # Ray Serve spreads replicas by node only where they have no placement group
    extra = dict(wanted.resources)
    if wanted.accelerator_type:
        # Ray's own spelling of accelerator_type inside a bundle.
        extra[f"accelerator_type:{wanted.accelerator_type}"] = 0.001
    if device == "cpu":
        return tuple({"CPU": float(cores), **extra} for _ in range(ranks))
    if spans_nodes(worker):
        return ({"CPU": float(cores)}, *({"GPU": 1.0, **extra} for _ in range(ranks)))
    return ({"CPU": float(cores), "GPU": ranks * (wanted.num_gpus or 1.0), **extra},)


def actor_options(
    worker: Worker, device: Device, cores: int, bundles: tuple[dict[str, float], ...]
) -> dict[str, Any]:
    """What the replica itself takes: its share of the first bundle, or of the node without one."""
    wanted = worker.deployment
    if worker.generator.type == "fake":
        # It computes nothing, so it takes nothing unless told to.
        return {"num_cpus": wanted.num_cpus or 0, "resources": dict(wanted.resources)}
    options: dict[str, Any] = {"num_cpus": cores}
    if device == "gpu":
        options["num_gpus"] = bundles[0].get("GPU", 0.0) if bundles else wanted.num_gpus or 1.0
    else:
        capacity = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_PRIMITIVES)}
        options["runtime_env"] = {"env_vars": openmp_environment(cores) | capacity}
    if not bundles:
        options["resources"] = dict(wanted.resources)
        if wanted.accelerator_type:
            options["accelerator_type"] = wanted.accelerator_type
    return options


def openmp_environment(threads: int) -> dict[str, str]:
    """Return what makes a process compute with Intel's OpenMP, which vLLM's CPU wheels bring along.

    Only an environment that exists before the process does can preload a library. Empty where it isn't.
    """
    library = Path(sys.prefix, "lib", "libiomp5.so")
    if not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "KMP_BLOCKTIME": OPENMP_SPIN, "OMP_NUM_THREADS": str(threads)}
