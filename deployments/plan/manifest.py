"""Plans → files for other tools: Ray Serve's deploy file, and KubeRay's RayService.

Both name the same builder and the same worker files, so that they can't diverge from them. Field names are
those of Ray Serve's ServeDeploySchema and of the ray.io/v1 RayService resource.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config.worker import BATCHES_NAME, INGRESS_NAME, NO_BATCHES, Worker, is_secret
from deployments.errors import ConfigError
from deployments.front.switches import FAST_DATA_PLANE
from deployments.keys.file import KEYS_VARIABLE
from deployments.plan.placement import DEVICES, Device
from deployments.plan.plan import WorkerPlan, engines_version, ingress_config

# One goes on while another is replaced.
INGRESS_REPLICAS = 2
IMPORT_PATH = "deployments.app:build"
NAME = "embedding-cluster"
WORKERS_FOLDER = "/etc/embedding-cluster/workers"
SECRET_NAME = f"{NAME}-workers"
# A secret that the operator makes of a key file, out of whose text pods take their environment.
KEYS_SECRET_NAME, KEYS_SECRET_ENTRY = f"{NAME}-keys", "keys.json"
# Another one, of what worker files hold that is secret: its entries become variables of the pods.
VARIABLES_SECRET_NAME = f"{NAME}-variables"
RAY_VERSION = "2.60.0"
REDIS_ADDRESS = "redis:6379"
# Ray and Serve beside the engines, per pod.
HEAD_CPUS = 2
POD_MEMORY_GIB = 16
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}


@dataclass(frozen=True)
class Front:
    """Who may reach the cluster, and how: a key file where the builder and each ingress run, or anybody.

    `batches` is a storage that all nodes reach; `allow_origins` whose pages may ask from a browser.
    """

    keys: str = ""
    insecure: bool = False
    public: bool = False
    batches: str = NO_BATCHES
    allow_origins: str = ""

    @property
    def host(self) -> str:
        """The address to listen on: that of this machine alone where nothing keeps others out."""
        return "0.0.0.0" if self.public or self.keys or self.insecure else "127.0.0.1"  # noqa: S104

    @property
    def arguments(self) -> dict[str, Any]:
        """What the builder is told."""
        keys = {"keys": self.keys} if self.keys else {}
        origins = {"allow_origins": self.allow_origins} if self.allow_origins else {}
        return keys | ({"insecure": True} if self.insecure else {}) | {"batches": self.batches} | origins


def serve_config(plans: Iterable[WorkerPlan], config: str, front: Front) -> dict[str, Any]:
    """Return a file for `serve deploy`; `config` is a path that exists where the builder runs.

    Ray Serve builds the application anew, with new replicas of everything, when `args` differ from the
    deployed ones, and else applies what stands under `deployments` to what runs. So `args` name the engines,
    and everything that can change in place stands below.
    """
    plans = tuple(plans)
    arguments = {"config": config, "engines": engines_version(plans), "ingress_replicas": INGRESS_REPLICAS}
    arguments |= front.arguments
    deployments = [{"name": plan.name, **plan.scaling_options} for plan in plans]
    names = [INGRESS_NAME] if front.batches == NO_BATCHES else [INGRESS_NAME, BATCHES_NAME]
    before = [{"name": name, "user_config": ingress_config(plans)} for name in names]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": front.host, "port": PORTS["serve"]},
        "applications": [
            {
                "name": "default",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments,
                "deployments": [*before, *deployments],
            }
        ],
    }


def ray_service(
    plans: Iterable[WorkerPlan], files: Mapping[str, str], image: str, serve_config_text: str
) -> list[dict[str, Any]]:
    """Return the Kubernetes resources: a secret with the worker files, and the RayService that mounts it.

    `files` are the worker files' texts by name, as `without_secrets` gives them.
    """
    plans = tuple(plans)
    by_device = {device: [plan for plan in plans if plan.device == device] for device in DEVICES}
    groups = [_group(device, of) for device, of in by_device.items() if of]
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
                "rayVersion": RAY_VERSION,
                # The operator makes the token and gives it to every pod.
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                # Without an external store the whole cluster ends with its head.
                "gcsFaultToleranceOptions": {"redisAddress": REDIS_ADDRESS},
                "headGroupSpec": {
                    # No engines on the head: it has to outlive them.
                    "rayStartParams": {"num-cpus": "0"},
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


def without_secrets(text: str, worker: Worker) -> str:
    """Return a worker file's text with nothing in the place of its secrets, which pods get as variables.

    Raises ConfigError where one is written in a way that can't be taken out.
    """
    token = worker.queue.token
    arguments = worker.generator.engine_args
    secrets = {name: each for name, each in arguments.items() if is_secret(name) and isinstance(each, str)}
    secrets |= {"token": token.get_secret_value()} if token is not None else {}
    for name, secret in secrets.items():
        text = re.sub(rf"""(\b{name}\s*=\s*)(["'])({re.escape(secret)})\2""", r"\1\2\2", text)
        if secret and secret in text:
            raise ConfigError(
                f"worker `{worker.name}`: {name}: can't be taken out of the file; use a variable"
            )
    return text


def _group(device: Device, plans: list[WorkerPlan]) -> dict[str, Any]:
    """Size a worker group: a pod holds the largest piece, and there are as many as all replicas need.

    A piece is what has to lie on one node: a replica, or with `PACK` one of its ranks.
    """
    kind = "GPU" if device == "gpu" else "CPU"
    pieces = {plan.name: _pieces(plan, kind) for plan in plans}
    pod = max(1, *(math.ceil(size) for size, _ in pieces.values()))
    in_a_pod = {name: max(1, int(pod / size)) if size else pod for name, (size, _) in pieces.items()}

    def pods(replicas: Mapping[str, int]) -> int:
        return sum(math.ceil(replicas[name] * count / in_a_pod[name]) for name, (_, count) in pieces.items())

    cpus = max(
        math.ceil(plan.total("CPU")) * (in_a_pod[plan.name] if device == "gpu" else 1) for plan in plans
    )
    resources: dict[str, Any] = {"cpu": max(1, cpus), "memory": f"{POD_MEMORY_GIB}Gi"}
    if device == "gpu":
        resources["nvidia.com/gpu"] = pod
    return {
        "name": f"{device}-workers",
        "min": pods({plan.name: plan.min_replicas for plan in plans}),
        "max": max(1, pods({plan.name: plan.worker.deployment.max_replicas for plan in plans})),
        "resources": resources,
    }


def _pieces(plan: WorkerPlan, kind: str) -> tuple[float, int]:
    """CPUs or GPUs that must lie on one node, and how many such pieces a replica has."""
    if plan.worker.deployment.placement_group_strategy == "PACK" and len(plan.pieces) > 1:
        wanted = [size for piece in plan.pieces if (size := piece.get(kind, 0.0))]
        return max(wanted, default=0.0), len(wanted)
    return plan.total(kind), 1


def _pod(image: str, resources: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a pod template: the data plane's switches, probes, the worker files."""
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in FAST_DATA_PLANE.items()
    ]
    keys = {"name": KEYS_SECRET_NAME, "key": KEYS_SECRET_ENTRY, "optional": True}
    environment.append({"name": KEYS_VARIABLE, "valueFrom": {"secretKeyRef": keys}})
    probe = {"httpGet": {"path": "/-/healthz", "port": PORTS["serve"]}, "periodSeconds": 5}
    described: dict[str, Any] = {
        "name": container,
        "image": image,
        "env": environment,
        "envFrom": [{"secretRef": {"name": VARIABLES_SECRET_NAME, "optional": True}}],
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
