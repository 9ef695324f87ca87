"""vLLM as an embedding engine: in the replica's own process, on a thread of its own.

vLLM loads the model, places its ranks and computes; `steps` decides what goes into a step, `choice` how it is
computed. Under tensor or pipeline parallelism vLLM's executor starts the ranks as processes. torch and vllm
are imported at use.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config.model_files import ModelFiles, is_hub_id, resolve_model_path
from deployments.engine import ModelCard
from deployments.engine.available import cpu_dtype, require_vllm
from deployments.engine.batch import TokenBatch
from deployments.engine.choice import Way, choose, one_line
from deployments.engine.cores import CoreClaim, sharers
from deployments.engine.steps import Step, StepQueue
from deployments.engine.tokenizer import check_vocabulary, read_tokenizer
from deployments.errors import EngineError, EngineStartError
from deployments.metrics import vllm_text
from deployments.plan.plan import WorkerPlan
from deployments.priority import behind_requests

logger = logging.getLogger("ray.serve")


class VllmEngine:
    """Runs one `LLMEngine`, or what it has loaded; see the module's docstring."""

    def __init__(self, plan: WorkerPlan, ray_cpus: float = 0) -> None:
        """Remember the plan; nothing is loaded yet."""
        self._plan = plan
        self._ray_cpus = ray_cpus
        self._queue = StepQueue(plan.engine_args["max_num_batched_tokens"])
        self._started = threading.Event()
        self._card: ModelCard | None = None
        self._failure: BaseException | None = None
        self._step: Step | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- the contract, called from the replica's threads -------------------------------------------

    @property
    def steps(self) -> int:
        """How many steps were computed."""
        return self._queue.steps

    @property
    def tokens_per_second(self) -> float:
        """How fast the engine is where it has enough to do; 0 until measured."""
        return self._queue.tokens_per_second

    def start(self) -> ModelCard:
        """Load the model on the engine's thread; all of torch's own threads belong to it."""
        require_vllm()
        self._thread.start()
        self._started.wait()
        if self._card is None:
            assert self._failure is not None
            if isinstance(self._failure, EngineStartError):
                raise self._failure
            raise EngineStartError(f"vLLM can't start: {one_line(self._failure)}") from self._failure
        return self._card

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Queue the batch for the engine's next steps."""
        return await self._queue.put(batch, bulk, alone)

    def check(self) -> None:
        """Raise if the engine's thread has ended."""
        self._queue.check()

    def metrics(self) -> bytes:
        """Return what vLLM counts, labelled with the worker's name."""
        return vllm_text()

    def stop(self) -> None:
        """Let the thread finish its step and end the ranks."""
        self._queue.close("the engine was stopped")
        if self._thread.is_alive():
            self._thread.join()

    # --- the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        claim = None
        engine = None
        try:
            if self._plan.device == "cpu":
                ranks = self._plan.worker.generator.world_size
                claim = CoreClaim(self._plan.cores_per_rank * ranks, shared_by=sharers(self._ray_cpus))
                self._bind(claim.claim())
            engine, card = self._load()
            way, why = choose(engine, card.tokenizer, card.max_model_len, self._plan.worker.generator.steps)
            logger.info("%s: %s", self._plan.name, why)
            self._card = replace(card, steps=why)
            self._started.set()
            self._serve(way)
        except BaseException as failure:
            self._failure = failure
            self._queue.close(f"the engine has ended: {one_line(failure)}")
        finally:
            self._queue.fail_all(self._step)
            if engine is not None:
                engine.engine_core.shutdown()
            if claim is not None:
                claim.release()
            self._started.set()

    def _bind(self, cores: Sequence[int]) -> None:
        """Keep this thread, and so all that torch starts from it, on its own cores.

        There it lets others go first: a step takes milliseconds, and what brings the next one a fraction.
        """
        os.sched_setaffinity(0, cores)
        behind_requests()
        each = self._plan.cores_per_rank
        os.environ["OMP_NUM_THREADS"] = str(each)
        ranks = [cores[start : start + each] for start in range(0, len(cores), each)]
        # vLLM's own choice would put every replica of a host on the same cores.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, rank)) for rank in ranks)
        if len(ranks) == 1:
            # vLLM binds the threads of the processes that it starts, and here it starts none. Unbound, the
            # kernel may wake two threads on one core and leave them there. Read when torch is imported.
            os.environ["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]"

    def _load(self) -> tuple[Any, ModelCard]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when the configuration is made
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        folder, files = self._model_folder()
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = dict(self._plan.engine_args)
        if files and files.is_causal:
            arguments.setdefault("convert", "embed")
        if arguments.get("dtype") == "auto" and self._plan.device == "cpu":
            arguments["dtype"] = cpu_dtype()
        arguments["served_model_name"] = self._plan.name  # the label of its metrics
        arguments["worker_extension_cls"] = "deployments.engine.packed.StepExtension"
        if isinstance(pooler := arguments.get("pooler_config"), dict):
            arguments["pooler_config"] = PoolerConfig(**pooler)
        engine = LLMEngine.from_engine_args(EngineArgs(model=folder, **arguments))
        config = engine.vllm_config.model_config
        tokenizer = read_tokenizer(arguments.get("tokenizer") or folder, files)
        check_vocabulary(tokenizer, int(config.get_vocab_size()))
        card = ModelCard(
            tokenizer=tokenizer,
            dimension=int(config.embedding_size),
            max_model_len=int(config.max_model_len),
            vocab_size=int(config.get_vocab_size()),
            prompts=files.prompts if files else self._plan.prompts,
            default_prompt=files.default_prompt if files else "",
        )
        return engine, card

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
        objections = files.objections(
            worker.generator.max_model_len,
            worker.generator.tensor_parallel_size,
            worker.generator.pipeline_parallel_size,
        )
        if objections:
            raise EngineStartError("; ".join(f"{key}: {reason}" for key, reason in objections))
        return folder, files

    def _serve(self, way: Way) -> None:
        """Compute one step after the other; sleep while there is nothing to do."""
        while (step := self._queue.wait()) is not None:
            self._step = step
            begun = time.perf_counter()
            try:
                rows = way.embed(step.batch)
            except EngineError as error:
                self._queue.fail(step, error)
                continue
            seconds = time.perf_counter() - begun
            finite, ended = self._queue.done(step, rows, seconds)
            self._step = None
            if not finite:
                way.clean()
            now = time.monotonic()
            spent = [(call.begun - call.arrived, now - call.begun) for call in ended]
            way.count(step.batch, self._queue.waiting, spent)
