"""What engines that compute share: a thread of their own, on cores of their own, one step after the other."""

import contextlib
import functools
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config.model_files import ModelFiles, is_hub_id, resolve_model_path
from deployments.engine import Engine, ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.cores import CoreClaim, sharers
from deployments.engine.steps import Step
from deployments.errors import EngineError, EngineStartError, first_line
from deployments.plan.plan import WorkerPlan, objections
from deployments.priority import behind_requests

logger = logging.getLogger("ray.serve")


class Way(ABC):
    """A way to compute steps, in every rank.

    While a GPU computes, the host prepares so many steps `ahead`; a CPU does one after the other.
    """

    ahead = 0
    token_dimension = 0

    @abstractmethod
    def embed(self, batch: TokenBatch) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension)."""

    def embed_tokens(self, batch: TokenBatch) -> np.ndarray:
        """Return float32 hidden states of shape (batch.tokens, token_dimension), where that isn't 0."""
        raise EngineError("this way gives no vectors of single tokens")

    def begin(self, batch: TokenBatch, by_token: bool = False) -> Callable[[], np.ndarray]:
        """Begin a step, and return what waits for its rows. They are asked for in the steps' order."""
        return functools.partial(self.embed_tokens if by_token else self.embed, batch)

    def clean(self) -> None:  # noqa: B027 - not every way keeps anything
        """Take what isn't finite out of the caches of every rank."""

    def count(  # noqa: B027 - nor has metrics of its own
        self, batch: TokenBatch, waiting: int, ended: Sequence[tuple[float, float]]
    ) -> None:
        """Count a step, how many inputs wait, and the seconds in line and in the engine of calls that end."""


@dataclass(eq=False)
class Begun:
    """A step that is computed, since when by `time.perf_counter`, and what waits for its vectors."""

    step: Step
    since: float
    vectors: Callable[[], np.ndarray] | None = None


class ThreadEngine(Engine):
    """An engine whose model is loaded and computed on one thread, which owns all of torch's."""

    name = ""

    def __init__(self, plan: WorkerPlan, ray_cpus: float = 0) -> None:
        """Remember the plan; nothing is loaded yet."""
        super().__init__(plan.engine_args["max_num_batched_tokens"])
        self._plan = plan
        self._ray_cpus = ray_cpus
        self._started = threading.Event()
        self._card: ModelCard | None = None
        self._failure: BaseException | None = None
        self._begun: deque[Begun] = deque()
        self._last_end = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @abstractmethod
    def _load(self) -> tuple[Way, ModelCard]:
        """Load the model. Whatever it raises is told as the reason why the engine can't start."""

    @abstractmethod
    def _odd_weights(self, vocab_size: int) -> Iterable[str]:
        """Return what `odd_weights` finds of the loaded model, in every rank."""

    def _unload(self) -> None:
        """End what was loaded, if anything was."""

    # --- the contract, called from the replica's threads -------------------------------------------

    def start(self) -> ModelCard:
        """Load the model on the engine's thread."""
        self._thread.start()
        self._started.wait()
        if self._card is None:
            assert self._failure is not None
            if isinstance(self._failure, EngineStartError):
                raise self._failure
            advice = "`generator.engine` names another engine, LOG_LEVEL=DEBUG shows more"
            reason = f"{self.name} can't start: {first_line(self._failure)}; {advice}"
            raise EngineStartError(reason) from self._failure
        return self._card

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Queue the batch for the engine's next steps."""
        return await self._queue.put(batch, bulk, alone)

    def stop(self) -> None:
        """Let the thread finish its step and end the ranks."""
        self._queue.close("the engine was stopped")
        if self._thread.is_alive():
            self._thread.join()

    # --- the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        claim = None
        try:
            if self._plan.device == "cpu":
                ranks = self._plan.worker.generator.world_size
                claim = CoreClaim(self._plan.cores_per_rank * ranks, shared_by=sharers(self._ray_cpus))
                self._bind(claim.claim())
            way, card = self._load()
            self._card = replace(card, token_dimension=way.token_dimension)
            logger.info("%s: %s", self._plan.name, self._card.steps)
            for reason in self._odd_weights(self._card.vocab_size):
                logger.warning("%s: %s", self._plan.name, reason)
            self._started.set()
            self._serve(way)
        except BaseException as failure:
            self._failure = failure
            self._queue.close(f"the engine has ended: {first_line(failure)}")
        finally:
            self._queue.fail_all(each.step for each in self._begun)
            self._unload()
            if claim is not None:
                claim.release()
            self._started.set()

    def _bind(self, cores: Sequence[int]) -> None:
        """Keep this thread, and so all that torch starts from it, on the replica's own cores.

        There it lets others go first: a step takes milliseconds, and what brings the next one a fraction.
        None of its threads has a core to itself: one that must wait until a core is free would hold up the
        others at each barrier of a step, with another core idle.
        """
        os.sched_setaffinity(0, cores)
        behind_requests()
        os.environ["OMP_NUM_THREADS"] = str(self._plan.cores_per_rank)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

    def _serve(self, way: Way) -> None:
        """Compute one step after the other, as many ahead as the way can; sleep while there is none."""
        while True:
            step = self._queue.take() if self._begun else self._queue.wait()
            if step is not None:
                self._begun.append(begun := Begun(step, time.perf_counter()))
                with self._surviving(begun):
                    begun.vectors = way.begin(step.batch, step.by_token)
            elif not self._begun:
                return
            if self._begun and (step is None or len(self._begun) > way.ahead):
                with self._surviving(self._begun[0]):
                    self._give(self._begun[0], way)

    @contextlib.contextmanager
    def _surviving(self, begun: Begun) -> Iterator[None]:
        """Fail the step with what the engine survives."""
        try:
            yield
        except EngineError as error:
            self._queue.fail(begun.step, error)
            self._begun.remove(begun)

    def _give(self, begun: Begun, way: Way) -> None:
        """Wait for a step's vectors and give them to its calls."""
        assert begun.vectors is not None
        rows = begun.vectors()
        # One that was begun ahead has waited for the one before.
        since, self._last_end = max(begun.since, self._last_end), time.perf_counter()
        finite, ended = self._queue.done(begun.step, rows, self._last_end - since)
        self._begun.remove(begun)
        if not finite:
            way.clean()
        now = time.monotonic()
        spent = [(call.begun - call.arrived, now - call.begun) for call in ended]
        way.count(begun.step.batch, self._queue.waiting, spent)

    def _published(self, files: ModelFiles | None) -> dict[str, Any]:
        """Return what a model's own files say on its card; of a hub's id the plan knows the prompts."""
        if files is None:
            return {"prompts": self._plan.prompts}
        return {
            "prompts": files.prompts,
            "default_prompt": files.default_prompt,
            "truncates_start": files.truncates_start,
            "normalizes": files.normalizes,
            "dimensions": files.dimensions,
        }

    def _model_folder(self) -> tuple[str, ModelFiles | None]:
        """Return the model's folder on this node and its files; of a hub id, the id and None."""
        worker = self._plan.worker
        try:
            folder = resolve_model_path(worker.generator.model_path)
            if is_hub_id(folder) and not Path(folder).is_dir():
                return folder, None
            files = ModelFiles.read(folder)
        except (FileNotFoundError, ValueError) as error:
            raise EngineStartError(f"generator.model_path: {error}") from error
        # Its engine was chosen without the files, where they lie on this node alone.
        found = objections(worker, files, self._plan.device, self._plan.engine)
        if found:
            raise EngineStartError("; ".join(f"{key}: {reason}" for key, reason in found))
        return folder, files


def odd_weights(weights: Iterable[tuple[str, Any]], vocab_size: int) -> list[str]:
    """Name the weights with NaN or infinity in them, and how many tokens of the table have none but zeros.

    One such row is usual: the padding token's.
    """
    found = []
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            found.append(f"the weights `{name}` hold NaN or infinity: some texts may have no vector")
        if tensor.dim() == 2 and tensor.shape[0] >= vocab_size:
            zeros = int((tensor[:vocab_size] == 0).all(dim=1).sum())
            if zeros > 1:
                found.append(f"{zeros} tokens of `{name}` hold nothing but zeros")
    return found
