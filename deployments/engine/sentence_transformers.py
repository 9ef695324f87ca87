"""The second engine: sentence-transformers itself, for models that vLLM hasn't or would compute otherwise.

It loads a folder as the model's authors do: any architecture of transformers, any pooling, any modules behind
that. torch and sentence-transformers are imported at use.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.thread import ThreadEngine, Way, odd_weights
from deployments.engine.tokenizer.loading import check_vocabulary, hub_options, lacking, tokenizer_card
from deployments.errors import EngineStartError
from deployments.machine import cpu_dtype

# A forward pads its inputs to the longest of them, and holds no more tokens than this when it has.
PADDED_TOKENS = 4096
# What one more forward costs a CPU, in tokens: more padding than this makes one worth it.
FORWARD_TOKENS = 32
READ_MARK = "_is_hf_initialized"


class SentenceTransformersEngine(ThreadEngine):
    """Runs one `SentenceTransformer`."""

    name = "sentence-transformers"
    _model: Any = None

    def _load(self) -> tuple[Way, ModelCard]:
        folder, files = self._model_folder()
        plan, model = self._plan, self._load_model(folder)
        self._model = model
        tokenizer = tokenizer_card(model.tokenizer, files)
        table = model[0].auto_model.get_input_embeddings().num_embeddings
        check_vocabulary(tokenizer["tokenizer"], table)
        longest = model.max_seq_length or (files.max_model_len if files else None)
        if not longest:
            raise EngineStartError(
                "generator.max_model_len: the model's files don't say how long inputs may be"
            )
        card = ModelCard(
            **tokenizer,
            dimension=int(model.get_embedding_dimension()),
            max_model_len=min(int(longest), plan.worker.generator.max_model_len or int(longest)),
            vocab_size=int(table),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            pooling=next((str(m.pooling_mode) for m in model if hasattr(m, "pooling_mode")), ""),
            pools_prompt=all(getattr(module, "include_prompt", True) for module in model),
            steps=f"sentence-transformers: {plan.engine_reason}",
            **self._published(files),
        )
        return Padded(model), card

    def _odd_weights(self, vocab_size: int) -> Iterable[str]:
        return odd_weights(self._model.named_parameters(), vocab_size)

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
    model = SentenceTransformer(
        folder, device=device, model_kwargs={"dtype": getattr(torch, dtype)}, **hub_options(arguments)
    )
    _check_complete(model[0].auto_model)
    return model.eval()


def _check_complete(model: Any) -> None:
    """Raise EngineStartError where a model of transformers has weights that no file gave: they are random.

    transformers, from 5 on, marks what it has read. Nobody here reads a pooler's.
    """
    marks = {name: getattr(tensor, READ_MARK, False) for name, tensor in model.named_parameters()}
    missing = [name for name, read in marks.items() if not read and "pooler." not in name]
    if missing and any(marks.values()):
        raise EngineStartError(lacking(missing))


class Padded(Way):
    """Steps as forwards of inputs of nearly one length each, padded to the longest."""

    def __init__(self, model: Any) -> None:
        """Take a `SentenceTransformer`."""
        self._model = model
        self.token_dimension = int(model[0].auto_model.config.get_text_config().hidden_size)
        self._padding = model.tokenizer.pad_token_id or 0
        # A GPU hardly feels the padding, and every forward.
        self._padding_tokens = FORWARD_TOKENS if model.device.type == "cpu" else PADDED_TOKENS

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        rows, order = [], []
        for group, features in self._forwards(batch):
            rows.append(_as_float32(features["sentence_embedding"]))
            order += group
        sorted_rows = np.concatenate(rows)
        found: np.ndarray = np.empty_like(sorted_rows)
        found[order] = sorted_rows
        return found

    def embed_tokens(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        rows: dict[int, np.ndarray] = {}
        for group, features in self._forwards(batch):
            for number, padded in zip(group, _as_float32(features["token_embeddings"]), strict=True):
                rows[number] = padded[: batch.lengths[number]]
        return np.concatenate([rows[number] for number in range(len(batch))])

    def _forwards(self, batch: TokenBatch) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield the numbers of inputs that go together, and what the model makes of them."""
        import torch

        inputs = list(batch)
        for unpooled, group in self._groups(batch):
            shape = len(group), int(batch.lengths[group].max())
            ids, mask = np.full(shape, self._padding, np.int64), np.zeros(shape, np.int64)
            for row, number in enumerate(group):
                given = inputs[number]
                ids[row, : len(given)] = np.where(given < 0, ~given, given)
                mask[row, : len(given)] = 1
            tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            features = {name: tensor.to(self._model.device) for name, tensor in tensors.items()}
            with torch.inference_mode():
                yield group, self._model(features | {"prompt_length": unpooled})

    def _groups(self, batch: TokenBatch) -> Iterator[tuple[int, list[int]]]:
        """Yield how many tokens the pooling leaves out, and the numbers of inputs that go together."""
        starts = np.cumsum(batch.lengths) - batch.lengths
        unpooled = np.add.reduceat(batch.ids < 0, starts, dtype=np.int64)
        for count in np.unique(unpooled).tolist():
            numbers = np.flatnonzero(unpooled == count)
            for group in groups(batch.lengths[numbers], self._padding_tokens):
                yield count, numbers[group].tolist()


def _as_float32(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array


def reference(
    folder: str, texts: Sequence[tuple[str, str | None]], max_model_len: int, arguments: Mapping[str, Any]
) -> tuple[np.ndarray, list[int]]:
    """Return the vectors that sentence-transformers gives in float32, and how many tokens each text has.

    A text comes with the name of its prompt, or None for the model's default.
    """
    model = load(folder, "cpu", "float32", arguments)
    model.max_seq_length = max_model_len
    vectors = [model.encode(text, prompt_name=use, convert_to_numpy=True) for text, use in texts]
    cut = {"truncation": True, "max_length": max_model_len}
    prompts = {None: model.prompts.get(model.default_prompt_name, ""), **model.prompts}
    ids = (model.tokenizer(prompts[use] + text, **cut)["input_ids"] for text, use in texts)
    return np.stack(vectors), list(map(len, ids))


def groups(lengths: np.ndarray, padding: int) -> Iterator[list[int]]:
    """Yield the numbers of inputs that go together, the longest first, with so much padding at most."""
    group: list[int] = []
    tokens = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        tokens += int(lengths[number])
        padded = (len(group) + 1) * int(lengths[group[0]]) if group else 0
        if padded > PADDED_TOKENS or padded - tokens > padding:
            yield group
            group, tokens = [], int(lengths[number])
        group.append(number)
    if group:
        yield group
