"""The worker files as they are now → a dispatch for each, in whatever process sends to replicas."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config.worker import Worker
from deployments.dispatch.catalog import Catalog
from deployments.dispatch.dispatch import Dispatch
from deployments.metrics import Metrics


class Workers:
    """Keeps a catalog up to date."""

    def __init__(
        self, handles: Mapping[str, DeploymentHandle[Any]], catalog: Catalog, metrics: Metrics
    ) -> None:
        """Serve nothing yet; `handles` are those that were bound with this deployment."""
        self._handles = handles
        self._catalog, self._metrics = catalog, metrics

    def take(self, config: Mapping[str, Any]) -> dict[str, Worker]:
        """Take over the worker files in `config["workers"]`, plain data by the worker's name; return them.

        What didn't change keeps its queue and its measurements; of what is gone nothing is kept.
        """
        workers = {name: Worker.model_validate(data) for name, data in config["workers"].items()}
        models = {("model", name) for worker in workers.values() for name in worker.queue.models}
        self._metrics.serve({("worker", name) for name in workers} | models)
        known = self._catalog.dispatches
        dispatches = {}
        for name, worker in workers.items():
            queue = worker.queue
            self._metrics.describe(name, queue.service_name, queue.service_role, str(queue.version))
            if name in known:
                dispatches[name] = known[name]
                dispatches[name].worker = worker
            else:
                dispatches[name] = Dispatch(worker, self._handle(name), self._metrics)
        self._catalog.update(dispatches)
        return workers

    def _handle(self, name: str) -> DeploymentHandle[Any]:
        """Return a worker's handle; one that came after this deployment isn't bound with it."""
        if name in self._handles:
            return self._handles[name]
        return serve.get_deployment_handle(name, serve.get_replica_context().app_name)
