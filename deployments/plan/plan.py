"""Workers + machine → plan: what Ray Serve and vLLM will be told, decided before anything starts.

One plan per worker. The replica and its ranks share one placement group: on CPUs a bundle for each
rank, the replica itself in the first; on GPUs of one node a single bundle with all of them, which
vLLM's `mp` executor splits; across nodes a bundle for the replica and one per GPU, which vLLM's Ray
executor fills.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from deployments.config.model_files import ModelFiles, content_id, resolve_model_path
from deployments.config.worker import Autoscaling, FakeEngineArgs, Worker, is_secret
from deployments.errors import ConfigError
from deployments.plan.engine_args import engine_args
from deployments.plan.placement import (
    Device,
    Machine,
    actor_options,
    bundles_of,
    cores_of_ranks,
    device_of,
    needs_cores,
)
from deployments.plan.sharing import tokens_that_fill

SCALING_POLICY = "deployments.replica.scaling:TokenPolicy"
# Requests that wait in a replica wait in its engine's queue, where they are batched.
MAX_ONGOING_REQUESTS = 1024
# Beside HAProxy, which has one thread, more of them wait for it.
CORES_PER_INGRESS, MAX_INGRESS_REPLICAS = 4, 8


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's deployment: everything that its replicas and the ingress need to know.

    `engine` computes the model, for `engine_reason`; `tokens_that_fill` is how long texts have to be for one
    engine to keep a large GPU busy, None where that isn't known.
    `package` tells model packages apart, and `engine_version` engines: replicas of one version give the
    same vectors, and what leaves it as it is changes in place, without a restart.
    """

    worker: Worker
    device: Device
    cores_per_rank: int
    engine_args: dict[str, Any]
    bundles: tuple[dict[str, float], ...]
    ray_actor_options: dict[str, Any]
    engine: str = "vllm"
    engine_reason: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    tokens_that_fill: int | None = None
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
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "steps": worker.generator.steps,
            "model_path": worker.generator.model_path,
            "device": self.device,
            "tensor_parallel_size": worker.generator.tensor_parallel_size,
            "pipeline_parallel_size": worker.generator.pipeline_parallel_size,
            "placement_group": {
                "bundles": [dict(bundle) for bundle in self.bundles],
                "strategy": worker.deployment.placement_group_strategy,
            },
            # `hf_token` and its like are secrets.
            "engine_args": {k: "**********" if is_secret(k) else v for k, v in self.engine_args.items()},
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
    devices = {worker.name: device_of(worker, machine) for worker in workers}
    models = {worker.name: _model_files(worker) for worker in workers}
    problems = [
        f"worker `{worker.name}`: {key}: {reason}"
        for worker in workers
        if devices[worker.name] == "cpu"
        for key, reason in (*worker.cpu_objections(), *objections(worker, models[worker.name][0], "cpu"))
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    shared = cores_of_ranks(workers, devices, machine)
    return tuple(_plan(worker, devices[worker.name], shared, *models[worker.name]) for worker in workers)


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


def ingress_replicas(plans: Iterable[WorkerPlan], machine: Machine) -> int:
    """Return how many HTTP processes a machine has cores for beside its engines.

    Each fills one with requests and more with long texts, which its tokenizer reads on several.
    """
    engines = sum(plan.min_replicas * plan.total("CPU") for plan in plans if plan.device == "cpu")
    return max(1, min(int(machine.cpus - engines) // CORES_PER_INGRESS, MAX_INGRESS_REPLICAS))


def objections(
    worker: Worker, files: ModelFiles | None, device: Device, engine: str | None = None
) -> list[tuple[str, str]]:
    """Return (key, reason) for each setting that a worker's model makes impossible; see `ModelFiles`."""
    wanted = worker.generator
    sizes = wanted.tensor_parallel_size, wanted.pipeline_parallel_size
    return files.objections(wanted.max_model_len, *sizes, engine or wanted.engine, device) if files else []


def _plan(
    worker: Worker, device: Device, shared_cores: int, files: ModelFiles | None, package: str
) -> WorkerPlan:
    cores = worker.deployment.num_cpus or (shared_cores if needs_cores(worker, device) else 1)
    bundles = bundles_of(worker, device, cores)
    engine, reason = _engine(worker, files, device)
    arguments = engine_args(worker, device, files, engine)
    # Replicas read it when they start.
    vocabulary = ("cl100k",) if worker.reads_cl100k else ()
    release = metadata.version("embedding-cluster")
    return WorkerPlan(
        worker=worker.model_copy(
            update={
                # The token is for the world outside: neither replica nor ingress has a use for it.
                "queue": worker.queue.model_copy(update={"token": None}),
                # Listings show both.
                "generator": worker.generator.model_copy(
                    update={
                        "engine": engine if files else worker.generator.engine,
                        "max_model_len": worker.generator.max_model_len
                        or (files.max_model_len if files else None),
                    }
                ),
            }
        ),
        device=device,
        cores_per_rank=cores,
        engine=engine,
        engine_reason=reason,
        engine_args=arguments,
        bundles=bundles,
        ray_actor_options=actor_options(worker, device, cores, bundles),
        prompts=files.prompts if files else {},
        tokens_that_fill=tokens_that_fill(files) if files and device == "gpu" else None,
        package=package,
        engine_version=_hash(package, engine, arguments, device, cores, release, *vocabulary),
    )


def _engine(worker: Worker, files: ModelFiles | None, device: Device) -> tuple[str, str]:
    """Return what computes a worker's model, and why."""
    if worker.generator.type == "fake":
        return "fake", "as generator.type says"
    if files is not None:
        return files.engine(worker.generator.engine, device)
    wanted = worker.generator.engine
    return wanted or "vllm", "as generator.engine says" if wanted else "the model's files aren't here"


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
