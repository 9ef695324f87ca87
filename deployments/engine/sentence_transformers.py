"""The second engine: sentence-transformers itself, for models that vLLM hasn't or would compute otherwise.

It loads a folder as the model's authors do: any architecture of transformers, any pooling, any modules behind
that. torch and sentence-transformers are imported at use.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deployments.engine import ModelCard
from deployments.engine.available import cpu_dtype
from deployments.engine.batch import TokenBatch
from deployments.engine.thread import ThreadEngine, Way
from deployments.engine.tokenizer import check_vocabulary, serialized
from deployments.errors import EngineStartError

# A forward pads its inputs to the longest of them, and holds no more tokens than this when it has.
PADDED_TOKENS = 4096


class SentenceTransformersEngine(ThreadEngine):
    """Runs one `SentenceTransformer`."""

    name = "sentence-transformers"

    def _load(self) -> tuple[Way, ModelCard]:
        folder, files = self._model_folder()
        plan, model = self._plan, self._load_model(folder)
        tokenizer = serialized(model.tokenizer.backend_tokenizer, files)
        table = model[0].auto_model.get_input_embeddings().num_embeddings
        check_vocabulary(tokenizer, table)
        longest = model.max_seq_length or (files.max_model_len if files else None)
        if not longest:
            raise EngineStartError(
                "generator.max_model_len: the model's files don't say how long inputs may be"
            )
        card = ModelCard(
            tokenizer=tokenizer,
            dimension=int(model.get_sentence_embedding_dimension()),
            max_model_len=min(int(longest), plan.worker.generator.max_model_len or int(longest)),
            vocab_size=int(table),
            prompts=files.prompts if files else plan.prompts,
            default_prompt=files.default_prompt if files else "",
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            pooling=next((str(m.pooling_mode) for m in model if hasattr(m, "pooling_mode")), ""),
            unit=any(type(module).__name__ == "Normalize" for module in model),
            steps=f"sentence-transformers: {plan.engine_reason}",
        )
        return Padded(model), card

    def _load_model(self, folder: str) -> Any:
        plan = self._plan
        dtype = plan.engine_args["dtype"]
        if dtype == "auto":
            dtype = cpu_dtype() if plan.device == "cpu" else "bfloat16"
        model = load(folder, "cuda" if plan.device == "gpu" else "cpu", dtype, plan.engine_args)
        if plan.device == "cpu":
            import torch

            torch.set_num_threads(plan.cores_per_rank)
        return model


def load(folder: str, device: str, dtype: str, arguments: Mapping[str, Any]) -> Any:
    """Return a `SentenceTransformer`. Raises EngineStartError where sentence-transformers isn't installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise EngineStartError(
            "this model needs sentence-transformers, which isn't installed: install the extra"
            " `sentence-transformers` of embedding-cluster"
        ) from error
    options = {name: arguments[name] for name in {"revision", "trust_remote_code"} & set(arguments)}
    model = SentenceTransformer(
        folder, device=device, model_kwargs={"dtype": getattr(torch, dtype)}, **options
    )
    return model.eval()


class Padded:
    """Steps as forwards of inputs of nearly one length each, padded to the longest."""

    def __init__(self, model: Any) -> None:
        """Take a `SentenceTransformer`."""
        self._model = model
        self._padding = model.tokenizer.pad_token_id or 0

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        import torch

        inputs = list(batch)
        rows: list[np.ndarray] = []
        order: list[int] = []
        with torch.inference_mode():
            for group in groups(batch.lengths):
                shape = len(group), int(batch.lengths[group].max())
                ids, mask = np.full(shape, self._padding, np.int64), np.zeros(shape, np.int64)
                for row, number in enumerate(group):
                    ids[row, : len(inputs[number])] = inputs[number]
                    mask[row, : len(inputs[number])] = 1
                given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
                given = {name: tensor.to(self._model.device) for name, tensor in given.items()}
                vectors = self._model(given)["sentence_embedding"]
                rows.append(vectors.to(device="cpu", dtype=torch.float32).numpy())
                order += group
        sorted_rows = np.concatenate(rows)
        found: np.ndarray = np.empty_like(sorted_rows)
        found[order] = sorted_rows
        return found

    def clean(self) -> None:
        """Do nothing: it keeps nothing from step to step."""

    def count(self, batch: TokenBatch, waiting: int, ended: Sequence[tuple[float, float]]) -> None:
        """Do nothing: it has no metrics of its own."""


def reference(
    folder: str, texts: Sequence[str], max_model_len: int, arguments: Mapping[str, Any]
) -> tuple[np.ndarray, list[int]]:
    """Return the vectors that sentence-transformers gives in float32, and how many tokens each text has."""
    model = load(folder, "cpu", "float32", arguments)
    model.max_seq_length = max_model_len
    # The prompts are in the texts already.
    vectors: np.ndarray = model.encode(list(texts), prompt="", convert_to_numpy=True)
    cut = {"truncation": True, "max_length": max_model_len}
    return vectors, [len(model.tokenizer(text, **cut)["input_ids"]) for text in texts]


def groups(lengths: np.ndarray) -> Iterator[list[int]]:
    """Yield the numbers of inputs that go together, the longest first, with little padding between them."""
    group: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        if group and (len(group) + 1) * lengths[group[0]] > PADDED_TOKENS:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
