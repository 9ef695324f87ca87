"""Public model names → the worker that serves each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.config.worker import Model
from deployments.dispatch.dispatch import Dispatch
from deployments.errors import (
    InvalidRequestError,
    MissingCapabilityError,
    ModelNotAllowedError,
    ModelNotFoundError,
)

# Whether a client may use the model of a public name.
MayUse = Callable[[str], bool]


@dataclass(frozen=True)
class Served:
    """A public name, what the worker file says of it, and the worker behind it."""

    name: str
    model: Model
    dispatch: Dispatch

    def has(self, tags: frozenset[str]) -> bool:
        """Whether its worker has all the tags."""
        return tags <= set(self.dispatch.worker.queue.tags)

    def check_embeds(self) -> None:
        """Raise MissingCapabilityError where the worker file doesn't say that the model embeds."""
        if not self.model.embedding_task.supported:
            raise MissingCapabilityError(f"`{self.name}` doesn't support embeddings", "model")

    def listing(self) -> dict[str, Any]:
        """Return the model's entry in OpenAI's listing, with our additions."""
        worker = self.dispatch.worker
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": worker.name,
            "version": worker.queue.version,
            "engine": worker.generator.served_by,
            "description": self.model.description,
            "maximum_completion_tokens": self.model.maximum_completion_tokens,
            "max_model_len": worker.generator.max_model_len,
            "embedding_task": {"supported": self.model.embedding_task.supported},
        }


def _names(models: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in models)


class Catalog:
    """All the models of the cluster, in the order of their files."""

    def __init__(self, dispatches: Mapping[str, Dispatch]) -> None:
        """Index the public names of every worker."""
        self.update(dispatches)

    def update(self, dispatches: Mapping[str, Dispatch]) -> None:
        """Serve these workers from now on; requests under way go on with what they found."""
        self.dispatches = dispatches
        self._served = {
            name: Served(name, model, dispatch)
            for dispatch in dispatches.values()
            for name, model in dispatch.worker.queue.models.items()
        }

    def find(
        self, name: str | None, tags: frozenset[str] = frozenset(), may_use: MayUse = lambda _: True
    ) -> Served:
        """Return the model of that name, or the only one where a client names none.

        Raises ModelNotFoundError that names those there are, InvalidRequestError where the name is missing
        and there are several, MissingCapabilityError where the model's worker lacks one of the tags, and
        ModelNotAllowedError where the client may not use it.
        """
        if name is None:
            return self._only(tags, may_use)
        served = self._served.get(name)
        if served is None:
            known = _names(filter(may_use, self._served))
            raise ModelNotFoundError(f"no model of that name; there are {known}", "model")
        if not may_use(name):
            raise ModelNotAllowedError(f"this key may not use `{name}`", "model")
        if tags and not served.has(tags):
            raise MissingCapabilityError(f"no worker of `{name}` has all of these tags", "tags")
        return served

    def _only(self, tags: frozenset[str], may_use: MayUse) -> Served:
        """Return the one model whose worker has the tags."""
        able = {name: each for name, each in self._served.items() if may_use(name) and each.has(tags)}
        if not able:
            raise MissingCapabilityError("no worker that this key may use has all of these tags", "tags")
        if len(able) > 1:
            raise InvalidRequestError(f"`model` must name one of {_names(able)}", "model")
        return next(iter(able.values()))

    def models(self, may_use: MayUse = lambda _: True) -> list[Served]:
        """Return every model that the client may use."""
        return [served for name, served in self._served.items() if may_use(name)]
