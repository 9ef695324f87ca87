"""vLLM as an embedding engine: in the replica's own process, on a thread of its own.

`LLMEngine` runs in the caller's process: no zmq, no serialisation. Measured against `AsyncLLM` on 2 cores
with all-MiniLM-L6-v2: ready in 8 s against 19, 1.4 times the short texts per second, half the time for a
single one. Under tensor or pipeline parallelism its executor starts the ranks as processes. torch and vllm
are imported here, at use.
"""

import asyncio
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config.model_files import ModelFiles, is_hub_id, resolve_model_path
from deployments.engine import ModelCard
from deployments.engine.available import cpu_dtype, require_vllm
from deployments.engine.batch import TokenBatch
from deployments.engine.cores import CoreClaim, sharers
from deployments.engine.tokenizer import check_vocabulary, read_tokenizer
from deployments.errors import EngineCrashError, EngineDeadError, EngineError, EngineStartError
from deployments.metrics import vllm_text
from deployments.plan.plan import WorkerPlan
from deployments.priority import behind_requests


@dataclass(eq=False)
class _Call:
    """One call of `embed`: its requests, the rows that are there and how many aren't, who waits for them."""

    inputs: list[list[int]]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[np.ndarray]"
    rows: list[np.ndarray | None] = field(default_factory=list)
    missing: int = 0
    pending: set[str] = field(default_factory=set)

    def settle(self, result: np.ndarray | None, error: BaseException | None) -> None:
        """Give the waiting task its result, from any thread."""

        def set_result() -> None:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            else:
                assert result is not None
                self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(set_result)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass


class VllmEngine:
    """Runs one `LLMEngine`; see the module's docstring."""

    def __init__(self, plan: WorkerPlan, ray_cpus: float = 0) -> None:
        """Remember the plan; nothing is loaded yet."""
        self._plan = plan
        self._ray_cpus = ray_cpus
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._running: dict[str, tuple[_Call, int]] = {}
        self._doubtful: deque[tuple[_Call, int]] = deque()  # rows that weren't finite, to be tried once more
        self._tried_again: str | None = None  # the request that is such a row's second try
        self._is_tainted = False  # whether a KV cache may hold what isn't finite
        self.steps = 0
        self._started = threading.Event()
        self._card: ModelCard | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._next_id = 0

    # --- the contract, called from the replica's threads -------------------------------------------

    def start(self) -> ModelCard:
        """Load the model on the engine's thread; all of torch's own threads belong to it."""
        require_vllm()
        self._thread.start()
        self._started.wait()
        if self._card is None:
            assert self._failure is not None
            if isinstance(self._failure, EngineStartError):
                raise self._failure
            raise EngineStartError(f"vLLM can't start: {_one_line(self._failure)}") from self._failure
        return self._card

    async def embed(self, batch: TokenBatch) -> np.ndarray:
        """Queue the batch for the engine's next step."""
        self.check()
        loop = asyncio.get_running_loop()
        call = _Call([ids.tolist() for ids in batch], loop, loop.create_future())
        self._calls.put(call)
        return await call.future

    def check(self) -> None:
        """Raise if the engine's thread has ended."""
        if self._failure is not None or (self._started.is_set() and not self._thread.is_alive()):
            raise EngineDeadError(f"the engine has ended: {_one_line(self._failure)}")

    def metrics(self) -> bytes:
        """Return what vLLM counts, labelled with the worker's name."""
        return vllm_text()

    def stop(self) -> None:
        """Let the thread finish its step and end the ranks."""
        self._calls.put(None)
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
            engine, self._card = self._load()
            self._started.set()
            self._serve(engine)
        except BaseException as failure:
            self._failure = failure
            self._fail_all(EngineCrashError(f"the engine has ended: {_one_line(failure)}"))
        finally:
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
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = dict(self._plan.engine_args)
        if files and files.is_causal:
            arguments.setdefault("convert", "embed")
        if arguments.get("dtype") == "auto" and self._plan.device == "cpu":
            arguments["dtype"] = cpu_dtype()
        arguments["served_model_name"] = self._plan.name  # the label of its metrics
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

    def _serve(self, engine: Any) -> None:
        """Add what waits, step, hand out what is done; sleep while there is nothing to do."""
        from vllm import PoolingParams

        parameters = PoolingParams(task="embed")
        while True:
            if self._is_tainted or self._doubtful or self._tried_again is not None:
                # Nobody new comes in until what runs has ended.
                if not self._running:
                    self._clean(engine, parameters)
            else:
                while not self._running or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        self._fail_all(EngineDeadError("the engine was stopped"))
                        return
                    self._add(engine, call, parameters)
            self._drop_cancelled(engine)
            if self._running:
                for output in engine.step():
                    self._collect(output)
                self.steps += 1

    def _clean(self, engine: Any, parameters: Any) -> None:
        """Take what isn't finite out of the caches, and try one of the rows that weren't once more, alone.

        A KV cache keeps it, and zero times NaN is NaN: whoever gets those blocks next gives NaN too, however
        good the input. Nothing may run meanwhile, since a long input's beginning lies in the cache.
        """
        self._tried_again = None
        if self._is_tainted:
            engine.collective_rpc(zero_caches)
            engine.reset_prefix_cache()
            self._is_tainted = False
        while self._doubtful and self._tried_again is None:
            call, row = self._doubtful.popleft()
            if not call.future.cancelled():
                self._tried_again = self._request(engine, call, row, parameters)

    def _add(self, engine: Any, call: _Call, parameters: Any) -> None:
        if call.future.cancelled():
            return
        call.missing = len(call.inputs)
        call.rows = [None] * call.missing
        for row in range(len(call.inputs)):
            try:
                self._request(engine, call, row, parameters)
            except ValueError as error:  # vLLM's refusal of this one prompt
                self._forget(engine, call)
                call.settle(None, EngineError(f"vLLM refused an input: {_one_line(error)}"))
                return

    def _request(self, engine: Any, call: _Call, row: int, parameters: Any) -> str:
        self._next_id += 1
        request_id = str(self._next_id)
        prompt = {"type": "token", "prompt_token_ids": call.inputs[row]}
        engine.add_request(request_id, prompt, parameters)
        self._running[request_id] = (call, row)
        call.pending.add(request_id)
        return request_id

    def _collect(self, output: Any) -> None:
        call, row = self._running.pop(output.request_id)
        call.pending.discard(output.request_id)
        # The tensor may be a view into the batch's buffer, which the next step writes over.
        vector = np.array(output.outputs.data.numpy(), dtype=np.float32, copy=True)
        if not np.isfinite(vector).all():
            self._is_tainted = True
            if output.request_id != self._tried_again:
                self._doubtful.append((call, row))
                return
        call.rows[row] = vector
        call.missing -= 1
        if not call.missing:
            try:
                call.settle(np.stack(call.rows), None)  # type: ignore[arg-type]
            except ValueError:  # an aborted request comes back as an empty row
                call.settle(None, EngineError("vLLM gave rows of different sizes"))

    def _drop_cancelled(self, engine: Any) -> None:
        for call in {call for call, _ in self._running.values() if call.future.cancelled()}:
            self._forget(engine, call)

    def _forget(self, engine: Any, call: _Call) -> None:
        engine.abort_request(list(call.pending))
        for request_id in call.pending:
            del self._running[request_id]
        call.pending.clear()

    def _fail_all(self, error: EngineDeadError) -> None:
        """Fail the calls that were in the engine with the error, and those that waited with its reason."""
        for call in {call for call, _ in (*self._running.values(), *self._doubtful)}:
            call.settle(None, error)
        self._running.clear()
        while not self._calls.empty():
            if (waiting := self._calls.get()) is not None:
                waiting.settle(None, EngineDeadError(error.message))


def zero_caches(worker: Any) -> None:
    """Fill a rank's KV caches with zeros; runs in that rank."""
    import torch

    with torch.inference_mode():  # as they were made
        for cache in worker.model_runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else (cache,):
                tensor.zero_()


def _one_line(error: BaseException | None) -> str:
    if error is None:
        return "it was stopped"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
