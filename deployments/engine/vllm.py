"""vLLM as an embedding engine, in the replica's own process.

vLLM loads the model, places its ranks and computes; `steps` decides what goes into a step, `choice` how it is
computed. Under tensor or pipeline parallelism vLLM's executor starts the ranks as processes. torch and vllm
are imported at use.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.config.modules import PROVEN
from deployments.engine import ModelCard
from deployments.engine.choice import choose
from deployments.engine.thread import ThreadEngine, Way
from deployments.engine.tokenizer.loading import check_vocabulary, check_weights, read_tokenizer
from deployments.machine import cpu_dtype, require_vllm
from deployments.metrics import vllm_text
from deployments.plan.engine_args import as_published, joined


class VllmEngine(ThreadEngine):
    """Runs one `LLMEngine`, or what it has loaded; see the module's docstring."""

    name = "vLLM"
    _engine: Any = None

    def metrics(self) -> bytes:
        """Return what vLLM counts, labelled with the worker's name."""
        return vllm_text()

    def _load(self) -> tuple[Way, ModelCard]:
        engine, card = self._load_engine()
        way, why = choose(engine, card.tokenizer, card.max_model_len, self._plan.worker.generator.steps)
        return way, replace(card, steps=why)

    def _odd_weights(self, vocab_size: int) -> Iterable[str]:
        found = self._engine.collective_rpc("odd_weights", args=(vocab_size,))
        return sorted({reason for rank in found for reason in rank})

    def _unload(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    def _load_engine(self) -> tuple[Any, ModelCard]:
        """Return an `LLMEngine` and its card."""
        require_vllm()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when the configuration is made
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        folder, files = self._model_folder()
        if files and files.text_config.get("model_type") in PROVEN and not files.is_quantized:
            check_weights(Path(folder))
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = dict(self._plan.engine_args)
        if files:  # which the plan may have been made without
            arguments = joined(as_published(files, arguments.get("max_model_len")), arguments)
        if arguments.get("dtype") == "auto" and self._plan.device == "cpu":
            arguments["dtype"] = cpu_dtype()
        arguments["served_model_name"] = self._plan.name  # the label of its metrics
        arguments["worker_extension_cls"] = "deployments.engine.choice.StepExtension"
        if isinstance(pooler := arguments.get("pooler_config"), dict):
            arguments["pooler_config"] = PoolerConfig(**pooler)
        engine = self._engine = LLMEngine.from_engine_args(EngineArgs(model=folder, **arguments))
        config = engine.vllm_config.model_config
        tokenizer = read_tokenizer(arguments.get("tokenizer") or folder, files, arguments)
        check_vocabulary(tokenizer["tokenizer"], int(config.get_vocab_size()))
        card = ModelCard(
            **tokenizer,
            dimension=int(config.embedding_size),
            max_model_len=int(config.max_model_len),
            vocab_size=int(config.get_vocab_size()),
            dtype=str(config.dtype).removeprefix("torch."),
            **self._published(files),
            pooling=str(config.pooler_config.seq_pooling_type or "").lower(),
        )
        return engine, card
