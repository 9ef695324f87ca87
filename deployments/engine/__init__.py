"""The engine's contract: what every engine has, over the queue of its steps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deployments.config.worker import FakeEngineArgs
from deployments.engine.batch import TokenBatch
from deployments.engine.steps import StepQueue
from deployments.plan.plan import WorkerPlan

# The keys under which a replica tells the routers its version, and where it can be called on its own node.
VERSION, ADDRESS = "version", "address"


@dataclass(frozen=True)
class ModelCard:
    """What the outside must know of a started model.

    `tokenizer` is the model's tokenizer in the JSON of Hugging Face's `tokenizers`; `dimension` the
    length of a vector; `max_model_len` the most tokens of an input; ids go from 0 to `vocab_size` - 1.
    `prompts` maps a use to the text put before each input, and `default_prompt` is that where no use is
    named; one that `truncates_start` drops what is too long there. It `normalizes` its vectors to unit
    length, and has shorter ones of other `dimensions`; `pooling` says how they are made of the tokens',
    those of a prompt among them where it `pools_prompt`.
    `chat_template` is Jinja that makes a text of chat messages, among whose variables are the names of the
    `special_tokens`; empty where the model has none.
    A token's own vector has `token_dimension` numbers; 0 where it gives none.
    `cl100k` holds the bytes of each of its tokens where clients send those. Replicas of one `version` give
    the same vectors. `steps` says how they are computed, and why so; `dtype` in which numbers.
    """

    tokenizer: str
    dimension: int
    max_model_len: int
    vocab_size: int
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    truncates_start: bool = False
    pools_prompt: bool = True
    normalizes: bool = True
    dimensions: tuple[int, ...] = ()
    cl100k: tuple[bytes, ...] = ()
    version: str = ""
    steps: str = ""
    dtype: str = ""
    pooling: str = ""
    chat_template: str = ""
    special_tokens: dict[str, Any] = field(default_factory=dict)
    token_dimension: int = 0


class Engine(ABC):
    """One model, loaded once. `start` comes first, `stop` last; `embed` may be called concurrently."""

    def __init__(self, max_tokens: int) -> None:
        """Take no more than `max_tokens` into a step."""
        self._queue = StepQueue(max_tokens)

    @property
    def steps(self) -> int:
        """How many steps were computed, whoever asked for them: an engine that hangs makes none."""
        return self._queue.steps

    @property
    def tokens_per_second(self) -> float:
        """What it does where it has enough to do, at steps as long as it likes; 0 until measured."""
        return self._queue.tokens_per_second

    @abstractmethod
    def start(self) -> ModelCard:
        """Load the model and return its card. Blocks; raises EngineStartError with one line."""

    @abstractmethod
    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), in the order of the batch.

        `bulk` work lets other calls go first; one that is `alone` is in no step with another's inputs.
        A row that isn't finite is what the model gives for that input, whatever was embedded beside or before
        it. Raises EngineError where this call failed, EngineDeadError where every later one will, and
        EngineCrashError where this one may be the cause. Cancelling the call frees its work.
        """

    async def embed_tokens(self, batch: TokenBatch, bulk: bool = False) -> np.ndarray:
        """Return float32 hidden states of shape (batch.tokens, hidden size), as they are before any pooling.

        For models that say so on their card; else as `embed`.
        """
        return await self._queue.put(batch, bulk, by_token=True)

    def check(self) -> None:
        """Raise EngineDeadError if the engine can't embed any more. Doesn't block."""
        self._queue.check()

    def metrics(self) -> bytes:
        """Return the engine's own metrics in Prometheus's text format; empty where it has none."""
        return b""

    @abstractmethod
    def stop(self) -> None:
        """End the engine and every process that it started. Blocks; may be called twice."""


def make_engine(plan: WorkerPlan, ray_cpus: float = 0) -> Engine:
    """Return the engine of a plan, not yet started.

    `ray_cpus` are the CPUs that Ray counts on this node, which may be more than it has cores.
    """
    if plan.engine == "fake":
        from deployments.engine.fake import FakeEngine

        arguments = FakeEngineArgs.model_validate(plan.engine_args)
        return FakeEngine(arguments, plan.worker.generator.max_model_len)
    if plan.engine == "sentence-transformers":
        from deployments.engine.sentence_transformers import SentenceTransformersEngine

        return SentenceTransformersEngine(plan, ray_cpus)
    from deployments.engine.vllm import VllmEngine

    return VllmEngine(plan, ray_cpus)
