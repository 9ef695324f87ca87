"""Plans → files for other tools: Ray Serve's deploy file, and KubeRay's RayService.

Both name the same builder and the same worker files, so that they can't diverge from them. Field names are
those of Ray Serve's ServeDeploySchema and of the ray.io/v1 RayService resource.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deployments.config.plan import Device, WorkerPlan

IMPORT_PATH = "deployments.app:build"
NAME = "embedding-cluster"
WORKERS_FOLDER = "/etc/embedding-cluster/workers"
SECRET_NAME = f"{NAME}-workers"
AUTH_SECRET_NAME = f"{NAME}-ray-auth"
REDIS_ADDRESS = "redis:6379"
# Ray and Serve beside the engines, per pod.
HEAD_CPUS = 2
POD_MEMORY_GIB = 16
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}

# What the tuned start sets for one machine, for every node of a cluster: read when Ray is imported.
FAST_DATA_PLANE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # A dead front is replaced after three failed checks, which by default are ten seconds apart.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # gRPC's own 4 MiB hold one answer of 2,730 vectors of 384 numbers; ours may be a hundred times that.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(512 * 2**20),
}


def serve_config(config: str) -> dict[str, Any]:
    """Return a file for `serve deploy`; `config` is a path that exists where the builder runs."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORTS["serve"]},  # noqa: S104 - for other machines
        "applications": [
            {"name": "default", "route_prefix": "/", "import_path": IMPORT_PATH, "args": {"config": config}}
        ],
    }


def ray_service(
    plans: Iterable[WorkerPlan], files: Mapping[str, str], image: str, serve_config_text: str
) -> list[dict[str, Any]]:
    """Return the Kubernetes resources: a secret with the worker files, and the RayService that mounts it.

    `files` are the worker files' texts by name. They go into a secret since they may hold tokens.
    """
    plans = tuple(plans)
    groups = [_group(device, of) for device in ("cpu", "gpu") if (of := _on(device, plans))]
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET_NAME},
        "type": "Opaque",
        "stringData": dict(files),
    }
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": serve_config_text,
            "rayClusterConfig": {
                "enableInTreeAutoscaling": True,
                # Without an external store the whole cluster ends with its head.
                "gcsFaultToleranceOptions": {"redisAddress": REDIS_ADDRESS},
                "headGroupSpec": {
                    # No engines on the head: it has to outlive them.
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "127.0.0.1"},
                    "template": _pod(image, {"cpu": HEAD_CPUS, "memory": "8Gi"}, "ray-head"),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": group.pop("name"),
                        "minReplicas": group["min"],
                        "maxReplicas": group["max"],
                        "replicas": group["min"],
                        "rayStartParams": {},
                        "template": _pod(image, group["resources"], "ray-worker"),
                    }
                    for group in groups
                ],
            },
        },
    }
    return [secret, service]


def _on(device: Device, plans: tuple[WorkerPlan, ...]) -> list[WorkerPlan]:
    return [plan for plan in plans if plan.device == device]


def _group(device: Device, plans: list[WorkerPlan]) -> dict[str, Any]:
    """Size a worker group: a pod holds the largest replica, and there are as many as all replicas need."""
    kind = "GPU" if device == "gpu" else "CPU"
    sizes = {plan.name: _size(plan, kind) for plan in plans}
    largest = max(1, *sizes.values())
    least = sum(sizes[plan.name] * plan.min_replicas for plan in plans)
    most = sum(sizes[plan.name] * plan.worker.deployment.max_replicas for plan in plans)
    cpus = max(1, *(_size(plan, "CPU") for plan in plans))
    resources: dict[str, Any] = {"cpu": cpus, "memory": f"{POD_MEMORY_GIB}Gi"}
    if device == "gpu":
        resources["nvidia.com/gpu"] = largest
    return {
        "name": f"{device}-workers",
        "min": math.ceil(least / largest),
        "max": max(1, math.ceil(most / largest)),
        "resources": resources,
    }


def _size(plan: WorkerPlan, kind: str) -> int:
    """CPUs or GPUs that one replica needs on one node."""
    bundles = plan.bundles or (plan.resources,)
    if plan.worker.deployment.placement_group_strategy == "PACK":
        return math.ceil(max(bundle.get(kind, 0.0) for bundle in bundles))
    return math.ceil(sum(bundle.get(kind, 0.0) for bundle in bundles))


def _pod(image: str, resources: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a pod template: the data plane's switches, token authentication, probes, the worker files."""
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in FAST_DATA_PLANE.items()
    ]
    token = {"secretKeyRef": {"name": AUTH_SECRET_NAME, "key": "token"}}
    environment += [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
    ]
    probe = {"httpGet": {"path": "/-/healthz", "port": PORTS["serve"]}, "periodSeconds": 5}
    described: dict[str, Any] = {
        "name": container,
        "image": image,
        "env": environment,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
        "volumeMounts": [{"name": "workers", "mountPath": WORKERS_FOLDER, "readOnly": True}],
    }
    if container == "ray-worker":
        # The proxy of a node answers once there is an ingress behind it; loading a model takes a while.
        described["readinessProbe"] = {**probe, "failureThreshold": 3}
        described["startupProbe"] = {**probe, "failureThreshold": 360}
    volume = {"name": "workers", "secret": {"secretName": SECRET_NAME}}
    return {"spec": {"containers": [described], "volumes": [volume]}}
