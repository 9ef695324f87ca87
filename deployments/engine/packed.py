"""A step of the model that vLLM loaded: flat token ids and lengths in, one float32 array out.

vLLM's scheduler was made for generation: request objects, blocks and outputs for each input cost many times
what the embedding of a short text does. Here numpy makes attention's metadata for a whole step at once;
metadata builders, forward context, model and pooler are vLLM's own, and none of its objects is changed.

It lives where the model does, in every rank. This is the one file with private names of vLLM, which were read
in the releases of `VERSIONS`. Where it can't serve it raises UnsupportedError, and `LLMEngine` does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import vllm
from vllm import PoolingParams
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import (
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.pool.metadata import PoolingCursor, PoolingMetadata, PoolingStates

VERSIONS = ("0.32.", "0.33.")
# Block 0 is vLLM's null block: what is padded points there.
NULL_BLOCKS = 1


class UnsupportedError(Exception):
    """`LLMEngine` has to serve this model; the text says why."""


@dataclass(frozen=True)
class Attention:
    """Layers that share metadata, what builds it, and the tokens of a block of their cache; 0 without one."""

    build: Callable[[CommonAttentionMetadata], Any]
    layers: tuple[str, ...]
    block_size: int


class PackedStep:
    """The step of one rank; `worker` is vLLM's, its model loaded."""

    def __init__(self, worker: Any) -> None:
        """Raise UnsupportedError for a model or configuration that isn't served this way."""
        runner = worker.model_runner
        self._config = runner.vllm_config
        self._device = runner.device
        if reasons := list(_objections(self._config, runner)):
            raise UnsupportedError("; ".join(reasons))
        self._model = runner.model
        pooler = self._model.pooler
        params = PoolingParams(task="embed")
        params.verify(self._config.model_config)  # which also says whether vectors are normalised
        pooler.get_pooling_updates("embed").apply(params)
        if params.requires_token_ids:
            raise UnsupportedError("its pooler reads token ids")
        self._params = params
        # A DispatchPooler would take a step apart into rows.
        self._pooler = getattr(pooler, "poolers_by_task", {}).get("embed", pooler)
        self._attention = list(_attention_of(runner))
        covered = {layer for each in self._attention for layer in each.layers}
        known = self._config.compilation_config.static_forward_context.items()
        layers = {name for name, layer in known if isinstance(layer, AttentionLayerBase)}
        if not layers or layers - covered:
            # A layer without metadata returns what its buffer held, and says nothing.
            raise UnsupportedError(
                f"{len(layers - covered)} of {len(layers)} attention layers are out of reach"
            )
        self._room = _room(runner, self._attention)
        self._arange = np.arange(self._config.scheduler_config.max_num_batched_tokens, dtype=np.int64)

    @torch.inference_mode()
    def begin(self, ids: np.ndarray, lengths: np.ndarray, by_token: bool = False) -> Callable[[], np.ndarray]:
        """Begin a step, and return what waits for its vectors: float32 of shape (len(lengths), dimension).

        Those `by_token` are hidden states, of shape (len(ids), hidden size).

        `ids` have shape (sum of lengths,) and stay as they are; both are int32. What is more than one
        forward may have is computed in several. A GPU computes while other steps begin.
        """
        rows, begin, token = [], 0, 0
        while begin < len(lengths):
            end = begin + self._fitting(lengths[begin:])
            stop = token + int(lengths[begin:end].sum())
            # The copy: BERT clears bits of the ids in place.
            rows.append(self._forward(ids[token:stop].astype(np.int32), lengths[begin:end], by_token))
            begin, token = end, stop
        # The vectors' way to the host is the last of what the GPU has been given until now.
        arrived = None if self._device.type == "cpu" else torch.cuda.current_stream().record_event()

        def vectors() -> np.ndarray:
            if arrived is not None:
                arrived.synchronize()
            return torch.cat(rows).numpy() if len(rows) > 1 else rows[0].numpy()

        return vectors

    def _fitting(self, lengths: np.ndarray) -> int:
        """Return how many inputs a forward may have, and the cache has blocks for."""
        fitting = int(np.searchsorted(np.cumsum(lengths), len(self._arange), side="right"))
        for size, blocks in self._room.items():
            needed = np.cumsum(-(-lengths // size))
            fitting = min(fitting, int(np.searchsorted(needed, blocks, side="right")))
        return max(1, fitting)

    def _forward(self, ids: np.ndarray, lengths: np.ndarray, by_token: bool) -> torch.Tensor:
        count, tokens = len(lengths), len(ids)
        starts = np.zeros(count + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        positions = self._arange[:tokens] - np.repeat(starts[:-1], lengths)
        on_host = torch.from_numpy(np.ascontiguousarray(lengths))
        starts_on_host = torch.from_numpy(starts)
        step = CommonAttentionMetadata(
            query_start_loc=self._send(starts_on_host),
            query_start_loc_cpu=starts_on_host,
            seq_lens=self._send(on_host),
            seq_lens_cpu_upper_bound=on_host,
            num_reqs=count,
            num_actual_tokens=tokens,
            max_query_len=int(lengths.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=starts_on_host,  # each attention gets its own, as of the slots
            slot_mapping=starts_on_host,
            causal=True,  # builders of encoders' attention say otherwise
            positions=self._send(torch.from_numpy(positions)),
        )
        metadata, slots = self._metadata(step, lengths, positions)
        mode = CUDAGraphMode.NONE
        with set_forward_context(
            metadata, self._config, num_tokens=tokens, cudagraph_runtime_mode=mode, slot_mapping=slots
        ):
            hidden = self._model(
                input_ids=self._send(torch.from_numpy(ids)),
                positions=step.positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return self._on_host(hidden if by_token else self._pool(hidden, step.query_start_loc, on_host))

    def _pool(self, hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the vectors of a step's hidden states, of shape (tokens, hidden size)."""
        pooling = PoolingMetadata(
            prompt_lens=lengths,
            prompt_token_ids=None,
            prompt_token_ids_cpu=None,
            pooling_params=[self._params] * len(lengths),
            pooling_states=[_NOTHING_KEPT] * len(lengths),
            pooling_cursor=PoolingCursor(
                first_token_indices_gpu=starts[:-1],
                last_token_indices_gpu=starts[1:] - 1,
                prompt_lens_cpu=lengths,
                seq_lens_cpu=lengths,
                num_scheduled_tokens_cpu=lengths,
                partial_prefill=False,  # an input goes whole into a step
                finished_mask=[True] * len(lengths),
            ),
        )
        rows = self._pooler(hidden_states=hidden, pooling_metadata=pooling)
        return rows if isinstance(rows, torch.Tensor) else torch.stack(list(rows))

    def _on_host(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows as float32 on the host, to which a GPU's are on their way."""
        rows = rows.to(torch.float32)
        if self._device.type == "cpu":
            return rows
        on_host = torch.empty(rows.shape, dtype=torch.float32, pin_memory=True)
        return on_host.copy_(rows, non_blocking=True)

    def _metadata(
        self, step: CommonAttentionMetadata, lengths: np.ndarray, positions: np.ndarray
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return each layer's metadata and slots: input after input has the next blocks of the cache."""
        metadata, slots = {}, {}
        made = {size: self._blocks_of(size, lengths, positions) for size in self._room}
        for attention in self._attention:
            if attention.block_size:
                step.block_table_tensor, step.slot_mapping = made[attention.block_size]
            else:  # an encoder's attention fills in its own
                step.block_table_tensor = torch.zeros(
                    (step.num_reqs, 1), dtype=torch.int32, device=self._device
                )
                step.slot_mapping = torch.zeros(len(positions), dtype=torch.int64, device=self._device)
            built = attention.build(step)
            metadata.update(dict.fromkeys(attention.layers, built))
            slots.update(dict.fromkeys(attention.layers, step.slot_mapping))
        return metadata, slots

    def _blocks_of(
        self, size: int, lengths: np.ndarray, positions: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a table of blocks, int32 of shape (inputs, most blocks), and slots, int64 of (tokens,)."""
        needed = -(-lengths // size)
        first = np.cumsum(needed) - needed + NULL_BLOCKS
        table = (first[:, None] + np.arange(needed.max())).astype(np.int32)
        slots = np.repeat(first * size, lengths) + positions
        return self._send(torch.from_numpy(table)), self._send(torch.from_numpy(slots))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the model's device; the copy is on its way when this returns."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


_NOTHING_KEPT = PoolingStates()  # only pooling in several steps keeps anything there


def _objections(config: Any, runner: Any) -> Iterator[str]:
    """Yield why a model or its configuration is left to `LLMEngine`."""
    model, parallel = config.model_config, config.parallel_config
    if not vllm.__version__.startswith(VERSIONS):
        yield f"vLLM {vllm.__version__} wasn't tried"
    if model.runner_type != "pooling":
        yield "it isn't a pooling model"
    if model.is_encoder_decoder or model.is_multimodal_model:
        yield "it reads more than text"
    if model.uses_mrope or getattr(runner, "uses_xdrope_dim", 0):
        yield "its positions have several dimensions"
    if getattr(runner, "lookback_token_ids", None) is not None:
        yield "it looks back at token ids"
    if config.lora_config or config.speculative_config or config.kv_transfer_config:
        yield "LoRA, speculation or KV transfer is configured"
    if parallel.pipeline_parallel_size > 1:
        yield "its pipeline stages are kept busy by vLLM's scheduler alone"
    if parallel.data_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "data or context parallelism is configured"
    if model.max_model_len > config.scheduler_config.max_num_batched_tokens:
        yield "its inputs may be longer than a step"


def _attention_of(runner: Any) -> Iterator[Attention]:
    """Yield how each group of attention layers gets its metadata. Raises UnsupportedError."""
    groups = runner.kv_cache_config.kv_cache_groups
    for group, attentions in zip(groups, runner.attn_groups, strict=True):
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = next(iter(spec.kv_cache_specs.values()))
        encodes = isinstance(spec, EncoderOnlyAttentionSpec)
        if isinstance(spec, MLAAttentionSpec) or not (
            encodes or isinstance(spec, FullAttentionSpec | SlidingWindowSpec)
        ):
            raise UnsupportedError(f"attention of {type(spec).__name__}")
        for each in attentions:
            if each.kernel_block_size is not None:
                raise UnsupportedError("a packed KV cache")
            size = 0 if encodes else each.get_metadata_builder(0).kv_cache_spec.block_size
            yield Attention(each.build_metadata, tuple(each.layer_names), size)
    # Model runner V2, which serves GPUs, keeps those of encoders elsewhere.
    for each in getattr(getattr(runner, "model_state", None), "encoder_attn_groups", ()):
        yield Attention(each.build_metadata, tuple(each.layer_names), 0)


def _room(runner: Any, attention: list[Attention]) -> dict[int, int]:
    """Return how many blocks of each size the caches have."""
    cached = runner.kv_cache_config
    tokens = [
        (cached.num_blocks - NULL_BLOCKS) * group.kv_cache_spec.block_size
        for group in cached.kv_cache_groups
        if not isinstance(group.kv_cache_spec, EncoderOnlyAttentionSpec)
    ]
    sizes = {each.block_size for each in attention if each.block_size}
    return {size: min(tokens) // size - NULL_BLOCKS for size in sizes}


class Counters:
    """vLLM's own metrics, which its scheduler would count; seconds once for each call, not for each input."""

    def __init__(self, engine: Any) -> None:
        """Find them where `LLMEngine` has made them."""
        self._stats = next(
            each for each in engine.logger_manager.stat_loggers if isinstance(each, PrometheusStatLogger)
        )

    def count(self, inputs: int, tokens: int, waiting: int, seconds: Sequence[tuple[float, float]]) -> None:
        """Count a step, what waits behind it, and of each call that it ends the seconds waited and inside."""
        stats = self._stats
        stats.counter_prompt_tokens[0].inc(tokens)
        stats.histogram_iteration_tokens[0].observe(tokens)
        stats.counter_request_success[FinishReason.STOP][0].inc(inputs)
        stats.gauge_scheduler_running[0].set(0)
        stats.gauge_scheduler_waiting[0].set(waiting)
        for queued, inside in seconds:
            stats.histogram_queue_time_request[0].observe(queued)
            stats.histogram_inference_time_request[0].observe(inside)
            stats.histogram_e2e_time_request[0].observe(queued + inside)

    def begin(self, inputs: int) -> None:
        """Say that a step of so many inputs runs."""
        self._stats.gauge_scheduler_running[0].set(inputs)
