"""A load generator that costs little: closed loop, raw sockets, checks after the clock has stopped.

A process of its own, told by one line of JSON. It makes all requests before it begins, and looks into the
answers when the last byte of the last one is there; in between it only finds out where each one ends.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop

from benchmarks.workloads import DIMENSION, Checker, Workload

ROOT = Path(__file__).parent.parent
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Task:
    """Send a workload to `url` for `warm_up` seconds, and then for `seconds` that count."""

    url: str
    workload: dict[str, Any]
    seconds: float
    warm_up: float
    reference: str = ""
    dimension: int = DIMENSION


@dataclass
class Result:
    """What one run of a workload gave. `cpu` is the generator's own share of a core."""

    requests: int
    texts: int
    seconds: float
    latencies: list[float]
    cpu: float = 0.0
    cosines: int = 0
    worst_cosine: float = 1.0
    errors: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task, times: list[tuple[float, float]], until: float, checker: Checker) -> "Result":
        """Sum up; `times` are begin and end of each request that ended since the clock ran.

        Those that ended after it stopped, at `until`, are checked and timed, and don't count for the rate.
        """
        count = sum(end <= until for _, end in times)
        return cls(
            count,
            count * task.workload["inputs"],
            task.seconds,
            [end - begun for begun, end in times],
            cosines=len(checker.cosines),
            worst_cosine=min(checker.cosines, default=1.0),
        )

    def value(self, workload: Workload) -> float:
        """Return what the workload is measured by."""
        if workload.is_time:
            return float(np.median(self.latencies)) * (1000 if workload.measure == "p50 ms" else 1)
        return (self.requests if workload.measure == "requests/s" else self.texts) / self.seconds


def send(task: Task) -> Result:
    """Run a task in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sender", json.dumps(asdict(task))]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Result(**json.loads(output))


class _Connection(asyncio.Protocol):
    """One client: sends a request when the last one is answered."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._answer = bytearray()
        self._size: int | None = None
        self._number = 0
        self._begun = 0.0
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        request = self._run.next()
        assert self._transport is not None
        if request is None:
            self._transport.close()
            return
        self._number, content = request
        self._begun = time.perf_counter()
        self._transport.write(content)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        answer += data
        if self._size is None:
            end = answer.find(HEAD_END)
            if end < 0:
                return
            head = bytes(answer[:end]).lower()
            start = head.find(b"content-length:")
            self._size = 0  # in chunks
            if start >= 0:
                self._size = end + len(HEAD_END) + int(head[start + 15 :].split(b"\r\n", 1)[0])
        if len(answer) == self._size or (not self._size and answer.endswith(b"0\r\n\r\n")):
            now = time.perf_counter()
            self._answer, self._size = bytearray(), None
            self._run.answered(self._number, self._begun, now, answer)
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(error)


class _Run:
    """All clients of one task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.workload = Workload(**task.workload)
        parts = urlsplit(task.url)
        self._address = parts.hostname or "", parts.port or 80
        generator = self.workload.requests()
        self._texts = [next(generator) for _ in range(self.workload.ready_requests)]
        bodies = [self.workload.body(texts, number) for number, texts in enumerate(self._texts)]
        self._contents = [self._request(body) for body in bodies]
        self._number = 0
        self._since = self._until = 0.0
        self.answers: list[tuple[int, float, float, bytes]] = []

    def _request(self, body: bytes) -> bytes:
        host, port = self._address
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer unused\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def next(self) -> tuple[int, bytes] | None:
        if time.perf_counter() >= self._until:
            return None
        number = self._number % len(self._contents)
        self._number += 1
        return number, self._contents[number]

    def answered(self, number: int, begun: float, now: float, answer: bytearray) -> None:
        if now >= self._since:
            self.answers.append((number, begun, now, bytes(answer)))

    async def clients(self, warm_up: float, seconds: float) -> float:
        """Send; return the CPU seconds that it took in the time that counts."""
        loop = asyncio.get_running_loop()
        self._since = time.perf_counter() + warm_up
        self._until = self._since + seconds
        started = 0.0

        def mark() -> None:
            nonlocal started
            started = time.process_time()

        loop.call_later(warm_up, mark)
        connections = [
            (await loop.create_connection(lambda: _Connection(self), *self._address))[1]
            for _ in range(self.workload.clients)
        ]
        for connection in connections:
            if (error := await connection.closed) is not None:
                raise error
        return time.process_time() - started

    def result(self, cpu: float) -> Result:
        """Check every answer and count."""
        checker = Checker(Path(self._task.reference) if self._task.reference else None)
        errors = []
        for number, _, _, answer in self.answers:
            try:
                body = body_of(answer)
                checker.check_answer(
                    self._texts[number], body, self.workload.encoding_format, self._task.dimension
                )
            except (AssertionError, KeyError, ValueError, TypeError) as error:
                errors.append(f"{type(error).__name__}: {error}: {answer[:300]!r}")
        times = [(begun, now) for _, begun, now, _ in self.answers]
        result = Result.of(self._task, times, self._until, checker)
        return replace(result, cpu=cpu / self._task.seconds, errors=errors[:3])


def body_of(answer: bytes) -> bytes:
    """Return the body of an answer with status 200. Raises AssertionError for another status."""
    head, _, body = answer.partition(HEAD_END)
    assert head.split(b" ", 2)[1] == b"200", "status"
    return b"".join(chunks(body)) if b"transfer-encoding: chunked" in head.lower() else body


def chunks(body: bytes) -> Iterator[bytes]:
    """Yield the chunks of a chunked body."""
    position = 0
    while size := int(body[position : (end := body.index(b"\r\n", position))], 16):
        yield body[end + 2 : end + 2 + size]
        position = end + 4 + size


async def _main(task: Task) -> Result:
    run = _Run(task)
    return run.result(await run.clients(task.warm_up, task.seconds))


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(_main(Task(**json.loads(sys.argv[1])))))))
