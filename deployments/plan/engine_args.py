"""What vLLM is told of a worker on its device."""

from typing import Any

from deployments.config.model_files import ModelFiles
from deployments.config.worker import Worker
from deployments.plan.placement import Device, spans_nodes
from deployments.plan.sharing import memory_of

MAX_BATCHED_TOKENS = 16_384  # one step's tokens; vLLM's library default of 2048 starves the batch
MIN_KV_CACHE_BYTES = 256 * 2**20
BLOCK_SIZE = 32  # tokens; the size that vLLM's CPU attention is fastest with
SPARE_BLOCKS = 4


def as_published(files: ModelFiles, max_model_len: int | None) -> dict[str, Any]:
    """Return what makes vLLM read a model's files as sentence-transformers does."""
    arguments: dict[str, Any] = {}
    if files.is_causal:
        arguments["convert"] = "embed"
    if files.is_bare:
        arguments["pooler_config"] = {"seq_pooling_type": "MEAN", "use_activation": False}
    if files.offset_positions:
        arguments["max_model_len"] = max_model_len or files.max_model_len
        if "position_embedding_type" not in files.text_config:  # as transformers 5 writes them
            arguments["hf_overrides"] = {"position_embedding_type": "absolute"}
    return arguments


def joined(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our arguments with an operator's over them, table by table."""
    tables = {
        key: ours[key] | value
        for key, value in theirs.items()
        if isinstance(value, dict) and isinstance(ours.get(key), dict)
    }
    return ours | theirs | tables


def engine_args(worker: Worker, device: Device, files: ModelFiles | None, engine: str) -> dict[str, Any]:
    """Return what an engine is told: of vLLM the arguments of its `EngineArgs`."""
    generator = worker.generator
    if engine == "fake":
        return dict(generator.engine_args)
    if engine != "vllm":
        return {"dtype": "auto", "max_num_batched_tokens": MAX_BATCHED_TOKENS, **generator.engine_args}
    longest = generator.max_model_len or (files.max_model_len if files else None)
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "dtype": "auto",
        "max_model_len": generator.max_model_len,
        "max_num_seqs": generator.max_num_seqs,
        "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, longest or 0),
        "tensor_parallel_size": generator.tensor_parallel_size,
        "pipeline_parallel_size": generator.pipeline_parallel_size,
        # Texts to embed seldom share a beginning; hashing each one's blocks costs more than it saves.
        "enable_prefix_caching": False,
    }
    if files:
        arguments |= as_published(files, arguments["max_model_len"])
    if generator.world_size > 1:
        arguments["distributed_executor_backend"] = "ray" if device == "gpu" and spans_nodes(worker) else "mp"
    if device == "cpu":
        # Room for a whole step, and for the block that vLLM sets aside.
        cached = arguments["max_num_batched_tokens"] + SPARE_BLOCKS * BLOCK_SIZE
        kv_bytes = files.kv_bytes_per_token * cached if files else 2**30
        arguments |= {
            "block_size": BLOCK_SIZE,
            # Unset, vLLM claims 92% of the node's memory, and a second replica on it can't start.
            "kv_cache_memory_bytes": max(MIN_KV_CACHE_BYTES, kv_bytes),
            # Compiling costs 10 s at every start and half a millisecond less a call. Pipeline
            # stages can't do without: vLLM skips the warm-up that sets up their buffers.
            "enforce_eager": generator.pipeline_parallel_size == 1,
        }
    else:
        arguments |= memory_of(worker)
    return {k: v for k, v in joined(arguments, generator.engine_args).items() if v is not None}
