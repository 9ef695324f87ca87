"""Workers + machine → plan: what Ray Serve and vLLM will be told, decided before anything starts.

One plan per worker. The replica and its ranks share one placement group: on CPUs a bundle for each
rank, the replica itself in the first; on GPUs of one node a single bundle with all of them, which
vLLM's `mp` executor splits; across nodes a bundle for the replica and one per GPU, which vLLM's Ray
executor fills.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from deployments.config.model_files import ModelFiles, content_id, resolve_model_path
from deployments.config.worker import Autoscaling, FakeEngineArgs, Worker, is_secret
from deployments.errors import ConfigError

Device = Literal["cpu", "gpu"]

SCALING_POLICY = "deployments.replica.scaling:TokenPolicy"
MAX_BATCHED_TOKENS = 16_384  # one step's tokens; vLLM's library default of 2048 starves the batch
MAX_CORES_PER_RANK = 16  # small encoders gain nothing from more
MIN_KV_CACHE_BYTES = 256 * 2**20
# Requests that wait in a replica wait in its engine's queue, where they are batched.
MAX_ONGOING_REQUESTS = 1024
BLOCK_SIZE = 32  # tokens; the size that vLLM's CPU attention is fastest with
SPARE_BLOCKS = 4
# How many of its products oneDNN keeps prepared, by their sizes. Each takes a quarter of a MiB, and lies
# between buffers that come and go: with its own number, 1,024, the engine grows by 300 to 400 MiB more. Few
# steps have the sizes of an earlier one; what this costs are 5 to 12% of those with 2 to 8 short texts.
ONEDNN_PRIMITIVES = 256
# How long OpenMP's threads spin for their next piece of work. That covers the pauses between a model's
# operations; between steps they leave the cores to the rest of the server.
OPENMP_SPIN = "100us"


def cores_here() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Machine:
    """What there is to share out: cores and GPUs in all, and the cores of the largest node."""

    cpus: int
    gpus: int
    cpus_per_node: int


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's deployment: everything that its replicas and the ingress need to know.

    `package` tells model packages apart, and `engine_version` engines: replicas of one version give the
    same vectors, and what leaves it as it is changes in place, without a restart.
    """

    worker: Worker
    device: Device
    cores_per_rank: int
    engine_args: dict[str, Any]
    bundles: tuple[dict[str, float], ...]
    ray_actor_options: dict[str, Any]
    prompts: dict[str, str] = field(default_factory=dict)
    package: str = ""
    engine_version: str = ""

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.worker.name

    @property
    def min_replicas(self) -> int:
        """How many replicas there are at least."""
        wanted = self.worker.deployment
        return wanted.autoscaling.min_replicas if wanted.autoscaling else wanted.num_replicas or 1

    @property
    def pieces(self) -> tuple[dict[str, float], ...]:
        """What one replica takes from Ray, in pieces that each lie on one node."""
        if self.bundles:
            return self.bundles
        options = self.ray_actor_options
        return ({"CPU": float(options.get("num_cpus", 0)), "GPU": float(options.get("num_gpus", 0))},)

    def total(self, kind: str) -> float:
        """CPUs or GPUs of one replica."""
        return sum(piece.get(kind, 0.0) for piece in self.pieces)

    @property
    def scaling_options(self) -> dict[str, Any]:
        """The part of `deployment_options` that says how many replicas there are."""
        wanted = self.worker.deployment
        if wanted.autoscaling:
            return {"autoscaling_config": _autoscaling_config(wanted.autoscaling)}
        return {"num_replicas": wanted.num_replicas or 1}

    @property
    def deployment_options(self) -> dict[str, Any]:
        """Arguments of Ray Serve's `Deployment.options`."""
        wanted = self.worker.deployment
        options: dict[str, Any] = {
            "name": self.name,
            "ray_actor_options": self.ray_actor_options,
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            **self.scaling_options,
        }
        if self.bundles:
            options["placement_group_bundles"] = [dict(bundle) for bundle in self.bundles]
            options["placement_group_strategy"] = wanted.placement_group_strategy
        elif wanted.max_replicas_per_node:
            options["max_replicas_per_node"] = wanted.max_replicas_per_node
        return options

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain data for people and tests; holds no secret."""
        worker = self.worker
        return {
            "deployment": self.name,
            "models": list(worker.queue.models),
            "version": worker.queue.version,
            "engine": worker.generator.type,
            "model_path": worker.generator.model_path,
            "device": self.device,
            "tensor_parallel_size": worker.generator.tensor_parallel_size,
            "pipeline_parallel_size": worker.generator.pipeline_parallel_size,
            "placement_group": {
                "bundles": [dict(bundle) for bundle in self.bundles],
                "strategy": worker.deployment.placement_group_strategy,
            },
            "engine_args": {name: _shown(name, value) for name, value in self.engine_args.items()},
            "scaling": worker.deployment.autoscaling.model_dump(exclude_none=True)
            if worker.deployment.autoscaling
            else {"num_replicas": self.deployment_options["num_replicas"]},
            "limits": worker.limits.model_dump(),
            "metrics_port": worker.monitoring.metrics_port or None,
            "tcp_probes": list(worker.monitoring.tcp_probes),
        }


def make_plans(workers: Iterable[Worker], machine: Machine) -> tuple[WorkerPlan, ...]:
    """Plan all the workers of a cluster together, since those on CPUs share its cores.

    Raises ConfigError that lists what can't run on the device that it would run on.
    """
    workers = tuple(workers)
    devices = {worker.name: _device(worker, machine) for worker in workers}
    problems = [
        f"worker `{worker.name}`: {key}: {reason}"
        for worker in workers
        if devices[worker.name] == "cpu"
        for key, reason in worker.cpu_objections()
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    shared = _shared_cores(workers, devices, machine)
    return tuple(_plan(worker, devices[worker.name], shared) for worker in workers)


def ingress_config(plans: Iterable[WorkerPlan]) -> dict[str, Any]:
    """Return what the ingress has to know of the workers as plain data; holds no secret.

    It is the ingress's `user_config`, which Ray Serve passes to the running one when it changes.
    """
    plans = tuple(plans)
    without = {"generator": {"engine_args"}, "queue": {"token"}}
    return {
        "workers": {
            plan.name: plan.worker.model_dump(mode="json", exclude_defaults=True, exclude=without)
            for plan in plans
        },
        "packages": {plan.name: plan.package for plan in plans},
    }


def engines_version(plans: Iterable[WorkerPlan]) -> str:
    """Return a short hash that changes when a worker comes, goes, or needs its engine started anew."""
    return _hash(sorted((plan.name, plan.engine_version) for plan in plans))


def unplaceable(plans: Iterable[WorkerPlan], machine: Machine) -> list[str]:
    """Return what can't be placed on a machine that doesn't grow, a line for each worker."""
    problems = []
    cpus, gpus = float(machine.cpus), float(machine.gpus)
    for plan in plans:
        count = plan.min_replicas
        wanted = {kind: count * plan.total(kind) for kind in ("CPU", "GPU")}
        cpus -= wanted["CPU"]
        gpus -= wanted["GPU"]
        if cpus < 0 or gpus < 0:
            needs = " and ".join(f"{number:g} {kind}s" for kind, number in wanted.items() if number)
            problems.append(
                f"worker `{plan.name}` needs {needs}, and with the workers before it that is more than"
                f" this machine's {machine.cpus} CPUs and {machine.gpus} GPUs;"
                " lower deployment.num_cpus, num_replicas or the parallel sizes"
            )
    return problems


def _shown(name: str, value: Any) -> Any:
    """Return an argument as it may be printed: `hf_token` and its like are secrets."""
    return "**********" if is_secret(name) else value


def _device(worker: Worker, machine: Machine) -> Device:
    if worker.generator.type == "fake":
        return "cpu"
    if worker.deployment.num_gpus is None:
        return "gpu" if machine.gpus else "cpu"
    return "gpu" if worker.deployment.num_gpus else "cpu"


def _needs_cores(worker: Worker, device: Device) -> bool:
    return device == "cpu" and worker.generator.type != "fake"


def _shared_cores(workers: tuple[Worker, ...], devices: Mapping[str, Device], machine: Machine) -> int:
    """Cores for each CPU rank that names no number: what the others leave, divided evenly, at least one."""
    sharing = [w for w in workers if _needs_cores(w, devices[w.name]) and not w.deployment.num_cpus]
    others = [w for w in workers if w not in sharing]
    taken = sum(_replica_cores(w, devices[w.name]) * w.deployment.max_replicas for w in others)
    ranks = sum(w.generator.world_size * w.deployment.max_replicas for w in sharing)
    largest = max((w.generator.world_size for w in sharing), default=1)
    even = (machine.cpus - taken) // ranks if ranks else 1
    return max(1, min(even, machine.cpus_per_node // largest, MAX_CORES_PER_RANK))


def _replica_cores(worker: Worker, device: Device) -> int:
    """Cores of one replica that names its number, or whose ranks compute on GPUs."""
    if worker.generator.type == "fake":
        return worker.deployment.num_cpus or 0
    ranks = worker.generator.world_size if device == "cpu" else 1
    return ranks * (worker.deployment.num_cpus or 1)


def _plan(worker: Worker, device: Device, shared_cores: int) -> WorkerPlan:
    files, package = _model_files(worker)
    cores = worker.deployment.num_cpus or (shared_cores if _needs_cores(worker, device) else 1)
    bundles = _bundles(worker, device, cores)
    engine_args = _engine_args(worker, device, files)
    # Replicas read it when they start.
    vocabulary = ("cl100k",) if worker.reads_cl100k else ()
    release = metadata.version("embedding-cluster")
    return WorkerPlan(
        worker=worker.model_copy(
            # The token is for the world outside: neither replica nor ingress has a use for it.
            update={"queue": worker.queue.model_copy(update={"token": None})}
        ),
        device=device,
        cores_per_rank=cores,
        engine_args=engine_args,
        bundles=bundles,
        ray_actor_options=_ray_actor_options(worker, device, cores, bundles),
        prompts=files.prompts if files else {},
        package=package,
        engine_version=_hash(package, engine_args, device, cores, release, *vocabulary),
    )


def _model_files(worker: Worker) -> tuple[ModelFiles | None, str]:
    """The model's files and what tells its package apart.

    Where they don't lie on this machine a replica elsewhere reads its own, and the path tells.
    """
    generator = worker.generator
    if generator.type == "fake":
        arguments = FakeEngineArgs.model_validate(generator.engine_args)
        return None, _hash(arguments.dimension, arguments.seed)
    path = generator.model_path
    try:
        folder = resolve_model_path(path)
        return ModelFiles.read(folder), content_id(folder)
    except (FileNotFoundError, ValueError):
        return None, _hash(path, generator.engine_args.get("revision"))


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _autoscaling_config(wanted: Autoscaling) -> dict[str, Any]:
    """Return Ray Serve's autoscaling configuration with our policy, which counts tokens."""
    ours = {"target_outstanding_s", "target_ongoing_requests"}
    policy = {
        "policy_function": SCALING_POLICY,
        "policy_kwargs": {
            "target_seconds": wanted.target_outstanding_s,
            "target_requests": wanted.target_ongoing_requests,
        },
    }
    return {**wanted.model_dump(exclude_none=True, exclude=ours), "policy": policy}


def _spans_nodes(worker: Worker) -> bool:
    return worker.deployment.placement_group_strategy == "PACK" and worker.generator.world_size > 1


def _bundles(worker: Worker, device: Device, cores: int) -> tuple[dict[str, float], ...]:
    ranks, wanted = worker.generator.world_size, worker.deployment
    if worker.generator.type == "fake" or wanted.max_replicas_per_node:
        return ()  # Ray Serve spreads replicas by node only where they have no placement group
    extra = dict(wanted.resources)
    if wanted.accelerator_type:
        # Ray's own spelling of accelerator_type inside a bundle.
        extra[f"accelerator_type:{wanted.accelerator_type}"] = 0.001
    if device == "cpu":
        return tuple({"CPU": float(cores), **extra} for _ in range(ranks))
    if _spans_nodes(worker):
        return ({"CPU": float(cores)}, *({"GPU": 1.0, **extra} for _ in range(ranks)))
    return ({"CPU": float(cores), "GPU": float(ranks), **extra},)


def _ray_actor_options(
    worker: Worker, device: Device, cores: int, bundles: tuple[dict[str, float], ...]
) -> dict[str, Any]:
    """What the replica itself takes: its share of the first bundle, or of the node without one."""
    wanted = worker.deployment
    if worker.generator.type == "fake":
        # It computes nothing, so it takes nothing unless told to.
        return {"num_cpus": wanted.num_cpus or 0, "resources": dict(wanted.resources)}
    options: dict[str, Any] = {"num_cpus": cores}
    if device == "gpu":
        options["num_gpus"] = bundles[0].get("GPU", 0.0) if bundles else 1.0
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


def _engine_args(worker: Worker, device: Device, files: ModelFiles | None) -> dict[str, Any]:
    generator = worker.generator
    if generator.type == "fake":
        return dict(generator.engine_args)
    longest = generator.max_model_len or (files.max_model_len if files else None)
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "dtype": "auto",
        "max_model_len": generator.max_model_len,
        "max_num_seqs": generator.max_num_seqs,
        "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, longest or 0),
        "tensor_parallel_size": generator.tensor_parallel_size,
        "pipeline_parallel_size": generator.pipeline_parallel_size,
        # Texts to embed seldom share a beginning; hashing each one's blocks costs more than it saves.
        "enable_prefix_caching": False,
    }
    if files and files.is_causal:
        arguments["convert"] = "embed"
    if generator.world_size > 1:
        arguments["distributed_executor_backend"] = (
            "ray" if device == "gpu" and _spans_nodes(worker) else "mp"
        )
    if device == "cpu":
        # Room for a whole step, and for the block that vLLM sets aside.
        cached = arguments["max_num_batched_tokens"] + SPARE_BLOCKS * BLOCK_SIZE
        kv_bytes = files.kv_bytes_per_token * cached if files else 2**30
        arguments |= {
            "block_size": BLOCK_SIZE,
            # Unset, vLLM claims 92% of the node's memory, and a second replica on it can't start.
            "kv_cache_memory_bytes": max(MIN_KV_CACHE_BYTES, kv_bytes),
            # Compiling costs 10 s at every start and half a millisecond less a call. Pipeline
            # stages can't do without: vLLM skips the warm-up that sets up their buffers.
            "enforce_eager": generator.pipeline_parallel_size == 1,
        }
    return {k: v for k, v in (arguments | generator.engine_args).items() if v is not None}
