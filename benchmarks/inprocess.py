"""Libraries in a process of their own, without a server: the engine alone, and sentence-transformers.

Reads a task a line from standard input and writes its result, as `benchmarks.sender` does for servers.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.sender import Result, Task
from benchmarks.subjects import Subject
from benchmarks.workloads import Checker, Workload

# Runs a workload for so many seconds of warm-up and so many that count; returns each request's texts, when
# it began and ended, and its vectors; and when the clock stopped.
Answered = list[tuple[list[str], float, float, np.ndarray]]
Embed = Callable[[Workload, float, float], tuple[Answered, float]]


def engine(subject: Subject) -> Embed:
    """Start our engine: token ids in, vectors out. It is the ceiling of any server of it."""
    from deployments.engine.batch import TokenBatch
    from deployments.engine.tokenizer import TextTokenizer
    from deployments.engine.vllm import VllmEngine

    started = VllmEngine(subject.plan())
    tokenizer = TextTokenizer(started.start().tokenizer)

    async def embed(workload: Workload, warm_up: float, seconds: float) -> tuple[Answered, float]:
        generator = workload.requests()
        requests = [next(generator) for _ in range(workload.ready_requests)]
        batches = [TokenBatch.of(tokenizer.encode(texts)) for texts in requests]
        answered: Answered = []
        since = time.perf_counter() + warm_up
        number = 0

        async def client() -> None:
            nonlocal number
            while (begun := time.perf_counter()) < since + seconds:
                mine = number % len(batches)
                number += 1
                vectors = await started.embed(batches[mine])
                if (end := time.perf_counter()) >= since:
                    answered.append((requests[mine], begun, end, vectors))

        await asyncio.gather(*(client() for _ in range(workload.clients)))
        return answered, since + seconds

    asyncio.run(started.embed(TokenBatch.of(tokenizer.encode(["the first text"]))))
    return lambda workload, warm_up, seconds: asyncio.run(embed(workload, warm_up, seconds))


def sentence_transformers(subject: Subject) -> Embed:
    """Load the model into sentence-transformers. It has no queue: what waits is embedded in one call."""
    import torch
    from sentence_transformers import SentenceTransformer

    from deployments.machine import cpu_dtype

    dtype = getattr(torch, cpu_dtype())
    model = SentenceTransformer(subject.folder, device="cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = subject.max_model_len

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode(texts, batch_size=64, show_progress_bar=False), np.float32)

    def embed(workload: Workload, warm_up: float, seconds: float) -> tuple[Answered, float]:
        generator = workload.requests()
        together = workload.clients if workload.inputs == 1 else 1
        answered: Answered = []
        since = time.perf_counter() + warm_up
        while (begun := time.perf_counter()) < since + seconds:
            requests = [next(generator) for _ in range(together)]
            vectors = encode([text for texts in requests for text in texts])
            now = time.perf_counter()
            if now >= since:
                for texts, rows in zip(requests, np.split(vectors, together), strict=True):
                    answered.append((texts, begun, now, rows))
        return answered, since + seconds

    encode(["the first text"])
    return embed


def run(embed: Embed, task: Task) -> Result:
    """Run a task; check every answer once the clock has stopped."""
    workload = Workload(**task.workload)
    answered, until = embed(workload, task.warm_up, task.seconds)
    checker = Checker(Path(task.reference) if task.reference else None)
    for texts, _, _, vectors in answered:
        checker.check(texts, vectors, task.dimension)
    times = [(begun, end) for _, begun, end, _ in answered]
    return Result.of(task, times, until, checker)


def main() -> None:
    """Answer every line."""
    told = json.loads(sys.argv[2])
    subject = Subject(**{**told, "worker_file": Path(told["worker_file"])})
    embed = {"engine": engine, "sentence-transformers": sentence_transformers}[sys.argv[1]](subject)
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(run(embed, Task(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
