"""Engines that share a GPU: what of its memory each one takes, and where one alone keeps it busy."""

import math
from typing import Any

from deployments.config.model_files import ModelFiles
from deployments.config.worker import Worker

# vLLM's own share of a GPU's memory, of which each of several engines takes its part.
MEMORY = 0.9
# What the host takes for an input in a step of many (benchmarks/README.md), and what a chip can do meanwhile:
# 40% of its dense bfloat16.
HOST_SECONDS, CHIP, CHIP_FLOPS = 12e-6, "H100", 0.4 * 989e12
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size")


def memory_of(worker: Worker) -> dict[str, Any]:
    """Return what an engine is told that has a part of a GPU: vLLM would take all of its memory."""
    part = worker.deployment.num_gpus or 1
    return {"gpu_memory_utilization": round(MEMORY * part, 3)} if part < 1 else {}


def tokens_that_fill(files: ModelFiles) -> int | None:
    """Return how long texts have to be for one engine to keep a chip busy; None where the files don't say."""
    sizes = [size for name in SIZES if isinstance(size := files.text_config.get(name), int) and size > 0]
    if len(sizes) < len(SIZES):
        return None
    layers, hidden, intermediate = sizes
    weights = layers * hidden * (4 * hidden + 2 * intermediate)
    return math.ceil(HOST_SECONDS * CHIP_FLOPS / (2 * weights))


def advice(tokens: int) -> str:
    """Return what an operator is told of it."""
    return (
        f"one engine keeps an {CHIP} busy with texts of {tokens} tokens or more; with shorter ones several do"
        " that share it, as with `num_gpus = 0.5`"
    )
