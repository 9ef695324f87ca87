"""Builds the Ray Serve application: the only place that binds deployments.

`serve run deployments.app:build config=PATH` calls `build` on the machine of the command line,
`serve deploy` inside the cluster.
"""

import asyncio
import logging
import os
import zlib
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from deployments.batches.deployment import BatchRunner
from deployments.batches.desk import BatchDesk, batch_place
from deployments.batches.store import BatchPlace, Quota
from deployments.config.load import load_workers
from deployments.config.origins import ORIGINS_VARIABLE, allowed_origins
from deployments.config.worker import BATCHES_NAME, INGRESS_NAME, RATES_NAME
from deployments.errors import ConfigError
from deployments.http.dialects.tei import MAX_INGRESS_REQUESTS
from deployments.http.ingress import AccessSettings, Ingress
from deployments.keys.rates import RateServer
from deployments.keys.ring import key_source
from deployments.logs import RequestLog
from deployments.machine import cores_here
from deployments.plan.placement import Machine
from deployments.plan.plan import WorkerPlan, ingress_config, make_plans
from deployments.replica.replica import Replica
from deployments.transport.applications import applications

logger = logging.getLogger("ray.serve")

ROUTER = "deployments.transport.serve_router.ServeRouter"
# How long the deployed ingress may take to say what it serves.
ANSWER_SECONDS = 30.0
HEALTH_CHECK_PERIOD_SECONDS = 5.0
HEALTH_CHECK_TIMEOUT_SECONDS = 30.0
# A replica that leaves looks this often whether its calls are done, and for the first time after so long: by
# then every ingress knows that it leaves. Whoever calls the ingress isn't ours, and has Ray Serve's own time.
DRAIN_CHECK_SECONDS = 0.5
INGRESS_DRAIN_CHECK_SECONDS = 2.0


class BuildArguments(BaseModel):
    """Arguments of `build`. From `serve run` every value comes as a string."""

    model_config = ConfigDict(extra="forbid")

    config: str = Field(description="A worker file, or a folder of them.")
    engines: str = Field(default="", description="Changes when `serve deploy` has to build everything anew.")
    ingress_replicas: int = Field(default=1, ge=1, description="How many ingress replicas there are.")
    metrics_host: str = Field(default="127.0.0.1", description="Address of the workers' metrics ports.")
    keys: str = Field(default="", description="A key file; every node with an ingress must have it.")
    insecure: bool = Field(default=False, description="Let other machines in without keys.")
    allow_origins: str = Field(
        default="",
        description="Origins whose pages may ask from a browser, with commas between; `*`: any."
        f" By default what {ORIGINS_VARIABLE} names, and none without it.",
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1, description="The largest request body, in bytes.")
    batches: str = Field(
        default="",
        description="Where files and batches are kept: a folder, or a URL that fsspec opens; `off`: nowhere."
        " By default a folder of this user's data on a single node, and nowhere on several.",
    )
    batch_days: int = Field(default=30, ge=1, description="How long files and batches are kept.")
    max_file_bytes: int = Field(default=200 * 2**20, ge=1, description="The largest file, in bytes.")
    max_key_files: int = Field(default=Quota.files, ge=1, description="The most files of one key.")
    max_key_bytes: int = Field(default=Quota.bytes, ge=1, description="The most bytes of files of one key.")
    max_key_batches: int = Field(
        default=Quota.batches, ge=1, description="The most batches of one key that aren't done."
    )


def build(arguments: BuildArguments) -> serve.Application:
    """Read the worker files and bind a deployment for each, and the ingress in front of them.

    Raises ConfigError that lists every mistake with file and key.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    # Models may lie only on the nodes that run them; with one node, they have to lie here.
    workers = load_workers(arguments.config, check_models=len(nodes) <= 1)
    plans = make_plans(workers, cluster_machine(nodes))
    if nodes:
        refuse_changed_packages(plans)
    handles = {plan.name: bind_replica(plan) for plan in plans}
    quota = Quota(arguments.max_key_files, arguments.max_key_bytes, arguments.max_key_batches)
    place = batch_place(arguments.batches, arguments.batch_days, len(nodes), quota)
    return bind_ingress(plans, handles, arguments, place)


def cluster_machine(nodes: list[dict[str, Any]]) -> Machine:
    """Sum up what the live nodes of a Ray cluster have; of no node at all, this machine."""
    if not nodes:
        return Machine(cores_here(), 0, cores_here())
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    return Machine(sum(cpus), gpus, max(cpus))


def refuse_changed_packages(plans: Iterable[WorkerPlan]) -> None:
    """Raise ConfigError for each worker that is deployed already in the same version with another model."""
    deployed = deployed_packages()
    changed = [
        f"worker `{plan.name}`: queue.version: {plan.worker.queue.version} is deployed with another model;"
        " another model needs another version"
        for plan in plans
        if plan.name in deployed
        and deployed[plan.name][0] == plan.worker.queue.version
        and deployed[plan.name][1] != plan.package
    ]
    if changed:
        raise ConfigError("\n".join(changed))


def deployed_packages() -> dict[str, tuple[int | str, str]]:
    """Return version and package of each worker that this cluster serves already."""
    for application in applications():
        try:
            packages: dict[str, tuple[int | str, str]] = ray.get(ask_packages.remote(application))
        except RayError:
            # A deployment may be just what mends an ingress that doesn't answer.
            logger.warning("the deployed ingress doesn't say which models it serves")
            continue
        return packages
    return {}


@ray.remote(num_cpus=0, max_calls=1)
def ask_packages(application: str) -> dict[str, tuple[int | str, str]]:
    """Ask the application's ingress. In a process of its own: a handle outlives no event loop."""

    async def ask() -> dict[str, tuple[int | str, str]]:
        async with asyncio.timeout(ANSWER_SECONDS):
            ingress = serve.get_deployment_handle(INGRESS_NAME, application)
            answer: dict[str, tuple[int | str, str]] = await ingress.packages.remote()
            return answer

    return asyncio.run(ask())


def logging_config() -> LoggingConfig:
    """Return Ray Serve's logging at the level and in the format that the environment names.

    Serve's own line for each request has neither model nor outcome, and is left out. Raises ConfigError for a
    level or a format that isn't one.
    """
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"LOG_LEVEL: no such level: {level}")
    return LoggingConfig(enable_access_log=False, log_level=level, encoding=RequestLog().encoding)


def bind_replica(plan: WorkerPlan) -> serve.Application:
    """Bind one worker's deployment."""
    deployment = _deployment(
        Replica,
        plan.engine_version,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_SECONDS,
        request_router_config={"request_router_class": ROUTER},
    )
    return deployment.options(**plan.deployment_options).bind(plan)


def bind_ingress(
    plans: tuple[WorkerPlan, ...],
    handles: dict[str, serve.Application],
    arguments: BuildArguments,
    place: BatchPlace | None = None,
) -> serve.Application:
    """Bind the ingress over the workers' handles, and beside it what runs batches."""
    keys = key_source(arguments.keys)
    rates = bind_rates() if keys and (arguments.ingress_replicas > 1 or place) else None
    origins = allowed_origins(arguments.allow_origins)
    # Serve puts its handle in the place of what was bound.
    access = AccessSettings(keys, arguments.insecure, rates, origins)  # type: ignore[arg-type]
    limits = arguments.max_body_bytes, arguments.max_file_bytes
    settings = (*limits, arguments.metrics_host, arguments.insecure, keys, rates is None, place, origins)
    ingress = _deployment(
        serve.ingress()(Ingress),
        _version(settings),
        **_beside_engines(INGRESS_NAME, arguments.ingress_replicas),
        graceful_shutdown_wait_loop_s=INGRESS_DRAIN_CHECK_SECONDS,
        user_config=ingress_config(plans),
    )
    desk = None
    if place is not None:
        runner = bind_batch_runner(plans, handles, place, access)
        desk = BatchDesk(place, arguments.max_file_bytes, runner)  # type: ignore[arg-type]  # as above
    return ingress.bind(handles, arguments.max_body_bytes, arguments.metrics_host, access, desk)


def bind_batch_runner(
    plans: tuple[WorkerPlan, ...],
    handles: dict[str, serve.Application],
    place: BatchPlace,
    access: AccessSettings,
) -> serve.Application:
    """Bind what works batches off: one for all ingress replicas."""
    settings = (place, access.keys, access.rates is None)
    options = _beside_engines(BATCHES_NAME)
    deployment = _deployment(BatchRunner, _version(settings), **options, user_config=ingress_config(plans))
    return deployment.bind(handles, place, access)


def bind_rates() -> serve.Application:
    """Bind what the ingress replicas share of the clients' rate limits."""
    version = metadata.version("embedding-cluster")
    return _deployment(RateServer, version, **_beside_engines(RATES_NAME)).bind()


def _deployment(target: Any, version: str, **options: Any) -> serve.Deployment:
    """Return a deployment with what all of ours share.

    Ray Serve replaces replicas where their version is another one, and makes one up where it is told none.
    """
    shared: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_PERIOD_SECONDS,
        "graceful_shutdown_wait_loop_s": DRAIN_CHECK_SECONDS,
        "logging_config": logging_config(),
    }
    deployment: serve.Deployment = serve.deployment(**shared | options)(target)
    return deployment.options(version=version, _internal=True)


def _beside_engines(name: str, replicas: int = 1) -> dict[str, Any]:
    """Return the options of what holds many requests and computes little: the cores are for the engines."""
    return {
        "name": name,
        "num_replicas": replicas,
        "max_ongoing_requests": MAX_INGRESS_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
    }


def _version(settings: Any) -> str:
    """Return a deployment's version: Ray Serve starts it anew where that changes, and else lets it run."""
    return f"{metadata.version('embedding-cluster')}-{zlib.crc32(repr(settings).encode())}"
