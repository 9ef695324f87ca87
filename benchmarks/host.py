"""What an engine costs beside its model: `make bench-host`.

The bundled model as a replica loads it, by each of the two engines in turn. Then with its forward replaced by
nothing: what is left is the host's work for each input, by vLLM's scheduler and by packed steps. Then with
forwards that take as long as an H100 would, without a core: the share of its time that one engine fills. Then
servers with a model that costs next to nothing, ours and vLLM's own, which so show what getting texts in and
vectors out costs.
"""

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.simulation import BGE_PARAMETERS, H100_PEAK, SHARE_OF_PEAK
from benchmarks.subjects import bundled
from deployments.config.model_files import resolve_model_path
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch, cosines
from deployments.engine.choice import Packed, Scheduled
from deployments.engine.sentence_transformers import Padded, load
from deployments.engine.thread import ThreadEngine, Way
from deployments.engine.vllm import VllmEngine
from deployments.plan.plan import WorkerPlan

COUNTS = (1, 16, 64, 256)
TOKENS = 20
ROUNDS, ROUND_SECONDS = 9, 0.2
SAME = 0.999
# A forward of bge-base on an H100 reads all of its weights.
WEIGHT_BYTES, BYTES_PER_SECOND = 2 * BGE_PARAMETERS, 3.35e12
# So many that there is always a step's worth waiting. A step may have the inputs of one call, or of eight.
CALLERS, CALL_INPUTS, STEP_CALLS, FED_SECONDS = 32, 64, (1, 8), 3.0
# Of a hidden state there, so that pooling costs its kernels' launches alone, as where a chip computes them.
THIN = 8


def without_forward(worker: Any, size: int = 0) -> None:
    """Let a rank's model return hidden states that nobody has computed; runs in that rank."""
    import torch

    runner = worker.model_runner
    size = size or runner.vllm_config.model_config.get_hidden_size()
    hidden = torch.ones(runner.vllm_config.scheduler_config.max_num_batched_tokens, size, dtype=runner.dtype)
    runner.model.forward = lambda input_ids, **_: hidden[: len(input_ids)]


def seconds_of(way: Way, batch: TokenBatch) -> float:
    """Return the least seconds of a step, of as many as a round has."""
    least, end = float("inf"), time.perf_counter() + ROUND_SECONDS
    while (begun := time.perf_counter()) < end:
        way.embed(batch)
        least = min(least, time.perf_counter() - begun)
    return least


def whole_steps(engine: Any, folder: str, rounds: int) -> Iterator[str]:
    """Yield the lines of a table of both engines: medians over the rounds of the least time in each."""
    dtype = str(engine.vllm_config.model_config.dtype).removeprefix("torch.")
    ways: tuple[Way, Way] = Packed(engine), Padded(load(folder, "cpu", dtype, {}))
    yield f"| 64 inputs in {dtype} | vLLM, ms | sentence-transformers, ms | ratio |"
    yield "|---|---|---|---|"
    mixed = np.random.default_rng(0).integers(6, 60, 64).tolist()
    for what, lengths in (("20 tokens each", [TOKENS] * 64), ("6 to 59 tokens", mixed)):
        batch = TokenBatch.of([[101, *range(2000, 2000 + length - 2), 102] for length in lengths])
        assert cosines(*(way.embed(batch) for way in ways)).min() > SAME
        seconds = np.array([[seconds_of(way, batch) for way in ways] for _ in range(rounds)])
        theirs, second = 1e3 * np.median(seconds, axis=0)
        ratio = np.median(seconds[:, 1] / seconds[:, 0])
        yield f"| {what} | {theirs:,.0f} | {second:,.0f} | {ratio:.2f} |"


def host_costs(engine: Any, rounds: int) -> Iterator[str]:
    """Yield the lines of the table of one engine: medians over the rounds of the least time in each."""
    ways: tuple[Way, Way] = Scheduled(engine), Packed(engine)
    engine.collective_rpc(without_forward)
    yield "| inputs of 20 tokens in a step | by vLLM's scheduler, µs an input | packed, µs an input | ratio |"
    yield "|---|---|---|---|"
    for count in COUNTS:
        batch = TokenBatch.of([[101, *range(2000, 2000 + TOKENS - 2), 102]] * count)
        seconds = np.array([[seconds_of(way, batch) for way in ways] for _ in range(rounds)])
        theirs, ours = 1e6 * np.median(seconds, axis=0) / count
        ratio = np.median(seconds[:, 0] / seconds[:, 1])
        yield f"| {count} | {theirs:,.1f} | {ours:,.1f} | {ratio:.1f} |"


class Asleep(Way):
    """A way whose forwards cost nothing, on a chip that takes an H100's time for one after the other."""

    def __init__(self, way: Way, ahead: int) -> None:
        """Take a way; `ahead` is as of `Way`."""
        self.ahead = ahead
        self.busy = self._free = 0.0
        self._way = way

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """See `Way`."""
        return self.begin(batch)()

    def begin(self, batch: TokenBatch, by_token: bool = False) -> Callable[[], np.ndarray]:
        """See `Way`: the host's work at once, the chip's while the caller does something else."""
        rows = self._way.embed(batch)
        computing = 2 * BGE_PARAMETERS * batch.tokens / (SHARE_OF_PEAK * H100_PEAK)
        seconds = max(computing, WEIGHT_BYTES / BYTES_PER_SECOND)
        end = self._free = max(time.perf_counter(), self._free) + seconds
        self.busy += seconds

        def vectors() -> np.ndarray:
            time.sleep(max(0.0, end - time.perf_counter()))
            return rows

        return vectors


class FedEngine(ThreadEngine):
    """A replica's engine with a way in place of a model."""

    def __init__(self, plan: WorkerPlan, card: ModelCard, way: Way) -> None:
        """Take a plan and a card of the model, and the way."""
        super().__init__(plan)
        self._card_of_model, self._way = card, way

    def _load(self) -> tuple[Way, ModelCard]:
        return self._way, self._card_of_model

    def _odd_weights(self, vocab_size: int) -> Iterable[str]:
        return ()


async def feed(engine: FedEngine, batch: TokenBatch) -> None:
    """Let each of some callers ask for the batch again and again."""
    end = time.perf_counter() + FED_SECONDS

    async def call() -> None:
        while time.perf_counter() < end:
            await engine.embed(batch)

    await asyncio.gather(*(call() for _ in range(CALLERS)))


def chip_shares(engine: Any, plan: WorkerPlan, card: ModelCard, rounds: int) -> Iterator[str]:
    """Yield the lines of a table of the chip's time that is filled; forwards cost nothing by now."""
    engine.collective_rpc(without_forward, args=(THIN,))
    scheduled, packed = Scheduled(engine), Packed(engine)
    ways = {
        "vLLM's scheduler": (scheduled, 0),
        "packed, one step after the other": (packed, 0),
        "packed, one step ahead": (packed, 1),
    }
    batch = TokenBatch.of([[101, *range(2000, 2000 + TOKENS - 2), 102]] * CALL_INPUTS)
    most = ({"max_num_batched_tokens": calls * batch.tokens} for calls in STEP_CALLS)
    plans = [replace(plan, engine_args=plan.engine_args | each) for each in most]
    shares: dict[str, tuple[list[float], ...]] = {what: ([], []) for what in ways}
    for _ in range(rounds):
        for (what, (way, ahead)), number in itertools.product(ways.items(), range(len(plans))):
            asleep = Asleep(way, ahead)
            fed = FedEngine(plans[number], card, asleep)
            fed.start()
            begun = time.perf_counter()
            asyncio.run(feed(fed, batch))
            shares[what][number].append(asleep.busy / (time.perf_counter() - begun))
            fed.stop()
    asked = f"{CALLERS} callers, each with {CALL_INPUTS} texts of {TOKENS} tokens"
    yield f"| bge-base on an H100, {asked} | filled, in steps of one call | in steps of {STEP_CALLS[1]} |"
    yield "|---|---|---|"
    for what, each in shares.items():
        one, waiting = map(np.median, each)
        yield f"| {what} | {one:.0%} | {waiting:.0%} |"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--keep", action="store_true", help="put the table into benchmarks/README.md")
    given = parser.parse_args()
    plan = bundled().plan()
    engine, card = VllmEngine(plan)._load_engine()
    folder = resolve_model_path(plan.worker.generator.model_path)
    tables = []
    for lines in (
        whole_steps(engine, folder, given.rounds),
        host_costs(engine, given.rounds),
        chip_shares(engine, plan, card, given.rounds),
    ):
        tables.append("\n".join(lines))
        print(f"{tables[-1]}\n", flush=True)
    engine.engine_core.shutdown()
    if given.keep:
        report.insert(report.NOTES, "host", "\n\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
