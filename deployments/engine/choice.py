"""The two ways to compute a step of the model that vLLM has loaded, and which of them serves."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from deployments.engine.batch import TokenBatch, cosines
from deployments.engine.thread import Way, odd_weights
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import EngineError, EngineStartError, first_line

# Both ways embed one batch of as many words as these.
WORD_COUNTS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
# They may add up in different orders.
MIN_COSINE = 0.999
# They are timed so often at a lone input and at a step of so many tokens; the least counts.
TIMED_STEPS = 3
TIMED_TOKENS = 1024
# Where one thread does so many tokens a second, what brings them needs the other cores more.
ONE_THREAD = 50_000

Wanted = Literal["auto", "packed", "scheduled"]
Ended = Sequence[tuple[float, float]]


class Scheduled(Way):
    """By vLLM's scheduler: an object or two for each input, and every model that vLLM has.

    Vectors of single tokens it has from packed steps, where there can be any: what a model can do mustn't
    hang on which way was the faster one today.
    """

    def __init__(self, engine: Any, packed: "Packed | None" = None) -> None:
        """Take an `LLMEngine` whose model is loaded."""
        from vllm import PoolingParams

        self._engine = engine
        self._packed = packed
        self.token_dimension = packed.token_dimension if packed else 0
        self._params = PoolingParams(task="embed")
        self._next_id = 0

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`. Raises EngineError for an input that vLLM refuses."""
        rows: dict[int, np.ndarray] = {}
        first = self._next_id
        try:
            for ids in batch:
                prompt = {"type": "token", "prompt_token_ids": ids.tolist()}
                self._engine.add_request(str(self._next_id), prompt, self._params)
                self._next_id += 1
        except ValueError as error:
            self._engine.abort_request([str(number) for number in range(first, self._next_id)])
            raise EngineError(f"vLLM refused an input: {first_line(error)}") from error
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                # A view into the step's buffer, which the next one writes over.
                rows[int(output.request_id)] = output.outputs.data.float().numpy().copy()
        return np.stack([rows[number] for number in range(first, self._next_id)])

    def embed_tokens(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        if self._packed is None:
            return super().embed_tokens(batch)
        hidden = self._packed.begin(batch, by_token=True)()
        self._packed.count(batch, 0, ())
        self.clean()  # of what the scheduler doesn't know that the caches hold now
        return hidden

    def clean(self) -> None:
        """See `Way`."""
        self._engine.collective_rpc("zero_caches")
        self._engine.reset_prefix_cache()


class Packed(Way):
    """By `PackedStep`: a step at once."""

    AHEAD = 1  # on a GPU: what comes meanwhile waits for no more than that

    def __init__(self, engine: Any) -> None:
        """Take an `LLMEngine` whose model is loaded. Raises EngineError where that can't be served so."""
        from deployments.engine.packed import Counters

        self._engine = engine
        self.token_dimension = int(engine.vllm_config.model_config.get_hidden_size())
        self._counters = Counters(engine)
        if reasons := [reason for reason in engine.collective_rpc("prepare_packed_steps") if reason]:
            raise EngineError(reasons[0])
        if engine.vllm_config.device_config.device_type != "cpu":
            self.ahead = self.AHEAD

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        self._counters.begin(len(batch))
        answers = self._engine.collective_rpc("packed_step", args=(batch.ids, batch.lengths))
        return _of_first_rank(answers)

    def begin(self, batch: TokenBatch, by_token: bool = False) -> Callable[[], np.ndarray]:
        """See `Way`."""
        self._counters.begin(len(batch))
        self._engine.collective_rpc("begin_packed_step", args=(batch.ids, batch.lengths, by_token))
        return lambda: _of_first_rank(self._engine.collective_rpc("end_packed_step"))

    def clean(self) -> None:
        """See `Way`."""
        self._engine.collective_rpc("zero_caches")

    def count(self, batch: TokenBatch, waiting: int, ended: Ended) -> None:
        """See `Way`."""
        self._counters.count(len(batch), batch.tokens, waiting, ended)


def _of_first_rank(answers: Sequence[np.ndarray | None]) -> np.ndarray:
    return next(answer for answer in answers if answer is not None)


class StepExtension:
    """What vLLM's `worker_extension_cls` adds to a worker: the same calls in every rank."""

    def prepare_packed_steps(self) -> str:
        """Return why there can't be any; empty where there can."""
        try:
            from deployments.engine.packed import PackedStep

            self._packed_step = PackedStep(self)
            self._begun: deque[Callable[[], np.ndarray]] = deque()
        except Exception as error:  # as where a name of vLLM's has moved
            return first_line(error)
        return ""

    def use_threads(self, count: int) -> int:
        """Let so many threads compute; return how many did before."""
        import torch

        before = torch.get_num_threads()
        # vLLM has put one that does nothing in the place of the public name.
        torch._C.set_num_threads(count)
        return before

    def packed_step(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """Return a step's vectors from the first rank, None from the others."""
        self.begin_packed_step(ids, lengths)
        return self.end_packed_step()

    def begin_packed_step(self, ids: np.ndarray, lengths: np.ndarray, by_token: bool = False) -> None:
        """See `PackedStep.begin`."""
        self._begun.append(self._packed_step.begin(ids, lengths, by_token))

    def end_packed_step(self) -> np.ndarray | None:
        """Wait for the first of the steps that were begun; return its vectors from the first rank alone."""
        from vllm.distributed import get_tp_group

        vectors: np.ndarray = self._begun.popleft()()
        return vectors if get_tp_group().is_first_rank else None

    def odd_weights(self, vocab_size: int) -> list[str]:
        """See `thread.odd_weights`."""
        return odd_weights(self.model_runner.model.named_parameters(), vocab_size)  # type: ignore[attr-defined]

    def zero_caches(self) -> None:
        """Take what isn't finite out of the KV caches: 0 times NaN would reach whoever gets a block next."""
        import torch

        with torch.inference_mode():  # as they were made
            for cache in self.model_runner.kv_caches:  # type: ignore[attr-defined]
                for tensor in cache if isinstance(cache, list | tuple) else (cache,):
                    tensor.zero_()


def choose(engine: Any, tokenizer: str, max_model_len: int, wanted: Wanted) -> tuple[Way, str]:
    """Return the way that serves and, for people, why.

    The packed one does where it gives the vectors of vLLM's scheduler and is no slower, or was `wanted`.
    """
    texts = [" ".join(["word"] * count) for count in WORD_COUNTS]
    inputs = [ids[:max_model_len] for ids in TextTokenizer(tokenizer).encode(texts)]
    full = -(-TIMED_TOKENS // sum(map(len, inputs)))
    batches = [TokenBatch.of(inputs), TokenBatch.of(inputs[:1]), TokenBatch.of(inputs * full)]
    scheduled = Scheduled(engine)
    if wanted == "scheduled":
        return scheduled, "vLLM's scheduler, as generator.steps says"
    # Before anything of ours has touched the model.
    references = scheduled.embed(batches[0])
    try:
        packed = Packed(engine)
        if not (cosines(packed.embed(batches[0]), references) >= MIN_COSINE).all():
            raise EngineError("its vectors would be others than those of vLLM's scheduler")
        (lone, their_lone), (step, their_step) = (_times((packed, scheduled), each) for each in batches[1:])
    except Exception as error:  # as where a private name has moved: the scheduler serves all the same
        if wanted == "packed":
            raise EngineStartError(
                f"generator.steps: no packed steps for this model: {first_line(error)}"
            ) from error
        scheduled.clean()
        return scheduled, f"vLLM's scheduler; no packed steps for this model: {first_line(error)}"
    times = (
        f"a lone input {lone * 1e3:.1f} ms (by vLLM's scheduler {their_lone * 1e3:.1f}),"
        f" {batches[2].tokens} tokens {step * 1e3:.1f} ms ({their_step * 1e3:.1f})"
    )
    if wanted == "auto" and lone * step > their_lone * their_step:
        scheduled = Scheduled(engine, packed)
        threads = choose_threads(engine, scheduled, batches[2])
        scheduled.clean()
        return scheduled, f"vLLM's scheduler, which is faster than packed steps: {times}{threads}"
    return packed, f"packed steps: {times}{choose_threads(engine, packed, batches[2])}"


def choose_threads(engine: Any, way: Way, batch: TokenBatch) -> str:
    """Let one thread compute, in every rank, where that is enough; say so."""
    if engine.vllm_config.device_config.device_type != "cpu":
        return ""
    before = engine.collective_rpc("use_threads", args=(1,))
    (seconds,) = _times((way,), batch)
    if batch.tokens >= ONE_THREAD * seconds:
        return ", by one thread"
    engine.collective_rpc("use_threads", args=(max(before),))
    return ""


def _times(ways: Sequence[Way], batch: TokenBatch) -> list[float]:
    """Return the least seconds that each way takes, in turns: what slows the machine slows both."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(TIMED_STEPS):
        for way, own in zip(ways, seconds, strict=True):
            begun = time.perf_counter()
            way.embed(batch)
            own.append(time.perf_counter() - begun)
    return [min(own) for own in seconds]
