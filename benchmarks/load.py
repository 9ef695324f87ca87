"""Load over HTTP from a process of its own, so that the sender's work doesn't show in what it measures.

Open loop: requests leave at random times whatever becomes of the ones before (Poisson), and a request's
time counts from when it was due. Closed loop: so many clients, each with one request at a time. No text is
sent twice. Vectors aren't looked at: other tests do that.
"""

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120.0
# The fake engine's tokenizer makes a token of each character; shorter texts couldn't all differ.
MIN_TOKENS = 10


@dataclass(frozen=True)
class Stream:
    """One kind of traffic. `tokens` is an input's length; with `sigma` their median (lognormal).

    With a `rate`, in requests per second, it is open loop; else `clients` send, each of them resting for
    `pause` seconds after an answer, at most `each` requests. It ends after `seconds`, or when it is told to.
    """

    url: str
    model: str
    clients: int = 1
    each: int = sys.maxsize
    rate: float = 0.0
    seconds: float = 3600.0
    pause: float = 0.0
    inputs: int = 1
    tokens: int = 20
    sigma: float = 0.0
    max_tokens: int = 2000
    key: str = "unused"
    query: str = ""
    seed: int = 0

    def run(self) -> "Seen":
        """Send for as long as `seconds` say."""
        return self._result(self._start(), stop=False)

    @contextmanager
    def running(self) -> Iterator["Seen"]:
        """Send until the block ends; what was seen is there afterwards."""
        seen, process = Seen(), self._start()
        try:
            yield seen
        finally:
            seen.answers = self._result(process, stop=True).answers

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(self))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()  # it sends from now on
        return process

    def _result(self, process: "subprocess.Popen[str]", stop: bool) -> "Seen":
        assert process.stdout is not None
        if stop:
            process.terminate()
        with process.stdout:
            output = process.stdout.read()
        assert process.wait() == 0
        return Seen([Answer(*each) for each in json.loads(output)])


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was due (`time.monotonic`), how long it took, how it ended."""

    began: float
    seconds: float
    status: int
    tokens: int
    retry_after: str
    code: str


@dataclass
class Seen:
    """All the answers to a stream."""

    answers: list[Answer] = field(default_factory=list)

    def between(self, since: float, until: float) -> "Seen":
        """Return those that arrived in that time."""
        return Seen([a for a in self.answers if since <= a.began + a.seconds < until])

    def of(self, status: int) -> "Seen":
        """Return those with that status."""
        return Seen([a for a in self.answers if a.status == status])

    def percentile(self, percent: float) -> float:
        """Return a percentile of the time they took, in milliseconds; NaN of nothing."""
        seconds = [a.seconds for a in self.answers]
        return float(np.percentile(seconds, percent)) * 1000 if seconds else float("nan")

    @property
    def tokens(self) -> int:
        """Tokens that were embedded."""
        return sum(a.tokens for a in self.answers if a.status == 200)

    def rate(self, since: float, until: float) -> float:
        """Tokens per second that were answered in that time.

        A request's tokens count evenly over the time that it took: of one that takes seconds, only a part
        may lie within.
        """
        total = 0.0
        for a in self.answers:
            inside = min(until, a.began + a.seconds) - max(since, a.began)
            if a.status == 200 and inside > 0:
                total += a.tokens * inside / a.seconds
        return total / (until - since)


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


class _Sender:
    """Sends a stream from this process."""

    def __init__(self, stream: Stream, session: aiohttp.ClientSession) -> None:
        self._stream = stream
        self._session = session
        self._rng = np.random.default_rng(stream.seed)
        self._count = 0
        self._url = f"{stream.url}/v1/embeddings{stream.query}"
        self._until = time.monotonic() + stream.seconds
        self.answers: list[Answer] = []

    async def run(self) -> None:
        if self._stream.rate:
            await self._open_loop()
        else:
            await asyncio.gather(*(self._client() for _ in range(self._stream.clients)))

    async def _open_loop(self) -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while due < self._until:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(self._send(*self._body(), due))
                due += self._rng.exponential(1 / self._stream.rate)

    async def _client(self) -> None:
        for _ in range(self._stream.each):
            body = self._body()
            await self._send(*body, time.monotonic())
            await asyncio.sleep(self._stream.pause)
            if time.monotonic() > self._until:
                break

    def _body(self) -> tuple[bytes, int]:
        """Return a request of texts that were never sent before, and its tokens."""
        lengths = self._rng.lognormal(np.log(self._stream.tokens), self._stream.sigma, self._stream.inputs)
        lengths = lengths.round().clip(MIN_TOKENS, self._stream.max_tokens).astype(int)
        texts = []
        for length in lengths:
            self._count += 1
            own = f"{self._stream.key[:1]}{self._stream.seed % 256:02x}{self._count:07x}"
            texts.append(own.ljust(int(length), "."))
        wanted = {"model": self._stream.model, "input": texts, "encoding_format": "base64"}
        return json.dumps(wanted).encode(), int(lengths.sum())

    async def _send(self, body: bytes, tokens: int, began: float) -> None:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._stream.key}"}
        status, code, retry_after = 0, "", ""
        try:
            async with self._session.post(self._url, data=body, headers=headers) as response:
                content = await response.read()
                status, retry_after = response.status, response.headers.get("retry-after", "")
                if status != 200:
                    code = json.loads(content)["code"]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            code = type(error).__name__
        self.answers.append(Answer(began, time.monotonic() - began, status, tokens, retry_after, code))


async def _main(stream: Stream) -> list[Answer]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        sender = _Sender(stream, session)
        sending = asyncio.ensure_future(sender.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sending.cancel)
        print("sending", flush=True)
        await asyncio.wait({sending})
        if not sending.cancelled():
            sending.result()
        return sender.answers


if __name__ == "__main__":
    seen = asyncio.run(_main(Stream(**json.loads(sys.argv[1]))))
    print(json.dumps([list(asdict(each).values()) for each in seen]))
