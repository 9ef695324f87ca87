"""An engine without a model for ray.serve.llm, named to it by RAYLLM_VLLM_ENGINE_CLS: its serving path alone.

Cheaper than its own would be: vLLM prints its answer as JSON, and ray.serve.llm reads that again.
"""

from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm.openai_api_models import EmbeddingRequest, EmbeddingResponse

from benchmarks.workloads import DIMENSION


class FakeEngine(LLMEngine):
    """Answers every text with the same vector, at once."""

    def __init__(self, llm_config: Any) -> None:
        """Make the vector."""
        self._vector = np.full(DIMENSION, DIMENSION**-0.5, np.float32).tolist()
        self._model = llm_config.model_id

    async def embeddings(  # type: ignore[override]  # its base declares a coroutine and awaits none
        self, request: EmbeddingRequest, raw_request_info: Any = None
    ) -> AsyncGenerator[EmbeddingResponse, None]:
        """Yield the one answer."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        data = [{"index": index, "embedding": self._vector} for index in range(len(texts))]
        tokens = sum(map(len, texts))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        yield EmbeddingResponse.model_validate({"model": self._model, "data": data, "usage": usage})

    async def start(self) -> None:
        """Load nothing."""

    def routing_stats(self) -> dict[str, Any]:
        """Return nothing for the router."""
        return {}

    async def check_health(self) -> None:
        """Be healthy."""

    async def reset_prefix_cache(self) -> None:
        """Have no cache."""

    async def resolve_lora(self, lora_model: Any) -> None:
        """Take none."""
        raise NotImplementedError

    async def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    chat = completions = transcriptions = tokenize = detokenize = _refuse  # type: ignore[assignment]
