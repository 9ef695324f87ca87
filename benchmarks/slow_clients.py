"""What many large bodies that come slowly cost, and whom: `make slow-clients`.

Each client sends a body of 30 MiB over 20 s, every second one without saying its length, and comes again
when it is told to. A neighbour sends small
requests one after the other, first alone and then beside them. One model on the stand-in engine, one ingress
replica, the tuned start and plain `serve run`.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Stream
from tests.harness import workers
from tests.harness.server import Server, serve

MIB = 2**20
CLIENTS, SECONDS, WARM_UP_SECONDS = 300, 60.0, 5.0
BODY_BYTES, BODY_SECONDS, PIECES = 30 * MIB, 20.0, 80
# They come one after the other, and so they come again.
ARRIVAL_SECONDS = 5.0
FIRST, LAST = b'{"model": "m", "input": "x"', b"}"
INGRESS = "ServeReplica:default:ingress"
LOOK_SECONDS = 0.2
# Ray's workers have it: who sends shall not take the cores from whoever answers.
WORKER_NICENESS = 15
MOST_BYTES, MOST_SLOWER = 1.5 * 2**30, 2.0
HEADER = [
    "data plane", "served", "refused with 503", "otherwise", "ingress at most, MiB",
    "neighbour's p99 alone, ms", "beside, ms", "its requests", "refused",
]  # fmt: skip


@dataclass
class Slow:
    """How the slow clients' requests ended, by status, and with which Retry-After; what the ingress took."""

    statuses: Counter[int] = field(default_factory=Counter)
    retry_after: Counter[str] = field(default_factory=Counter)
    most_bytes: int = 0


def request(in_chunks: bool) -> tuple[bytes, bytes, bytes]:
    """Return how a request begins, a piece of it that is sent many times, and its end."""
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
    space = b" " * (BODY_BYTES // PIECES)
    if not in_chunks:
        length = len(FIRST) + PIECES * len(space) + len(LAST)
        return f"{head}Content-Length: {length}\r\n\r\n".encode() + FIRST, space, LAST
    first, space, last = (b"%x\r\n%b\r\n" % (len(each), each) for each in (FIRST, space, LAST))
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + first, space, last + b"0\r\n\r\n"


@dataclass(frozen=True)
class Crowd:
    """So many clients that send for so long, each body in `body_seconds`."""

    clients: int
    seconds: float
    body_seconds: float = BODY_SECONDS


async def send_slowly(url: str, parts: tuple[bytes, bytes, bytes], pause: float, seen: Slow) -> None:
    """Send one request after the other, with a pause after each piece, until cancelled."""
    while True:
        told = await answer_to(url, parts, pause)
        status = int(told.split(b" ", 2)[1])
        seen.statuses[status] += 1
        if status == 503:
            _, _, again = told.lower().partition(b"\r\nretry-after: ")
            wait = again.split(b"\r\n")[0].decode()
            seen.retry_after[wait] += 1
            await asyncio.sleep(float(wait or 1))


async def answer_to(url: str, parts: tuple[bytes, bytes, bytes], pause: float) -> bytes:
    """Send one request until it is answered; return the answer's head, with status 0 where there is none."""
    address, (first, space, last) = urlsplit(url), parts
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    answer = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    try:
        with contextlib.suppress(ConnectionError):  # the answer says why
            for content in (first, *itertools.repeat(space, PIECES), last):
                writer.write(content)
                await asyncio.wait({answer}, timeout=pause)
                if answer.done():
                    break
        return await answer
    except (ConnectionError, asyncio.IncompleteReadError):
        return b"HTTP/1.1 0 cut"
    finally:
        answer.cancel()
        writer.transport.abort()


@contextlib.contextmanager
def slow_clients(server: Server, crowd: Crowd) -> Iterator[Slow]:
    """Let them send; what was seen is whole when the block ends."""
    seen = Slow()

    async def all_of_them() -> None:
        kinds = itertools.cycle((request(in_chunks=False), request(in_chunks=True)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(crowd.seconds), asyncio.TaskGroup() as tasks:
                for parts in itertools.islice(kinds, crowd.clients):
                    tasks.create_task(send_slowly(server.url, parts, crowd.body_seconds / PIECES, seen))
                    await asyncio.sleep(ARRIVAL_SECONDS / crowd.clients)

    def watch() -> None:
        while sending.is_alive():
            seen.most_bytes = max(seen.most_bytes, ingress_bytes(server))
            time.sleep(LOOK_SECONDS)

    def send() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, WORKER_NICENESS)  # this thread alone
        asyncio.run(all_of_them())

    sending = threading.Thread(target=send)
    watching = threading.Thread(target=watch)
    sending.start()
    watching.start()
    try:
        yield seen
    finally:
        sending.join()
        watching.join()


def ingress_bytes(server: Server) -> int:
    """Return the resident memory of all ingress replicas."""
    return sum(process.memory_info().rss for process in server.titled(INGRESS))


def measure(server: Server, crowd: Crowd) -> tuple[list[str], bool]:
    """Return the row of a server, and whether it is within what is asked for."""
    neighbour = Stream(server.url, "m", seconds=crowd.seconds, pause=0.01)
    replace(neighbour, seconds=WARM_UP_SECONDS).run()
    alone = neighbour.run().percentile(99)
    with slow_clients(server, crowd) as slow:
        beside = neighbour.run()
    refused = len(beside.answers) - len(beside.of(200).answers)
    p99 = beside.of(200).percentile(99)
    otherwise = {status: n for status, n in slow.statuses.items() if status not in (200, 503)}
    row = [
        str(slow.statuses[200]),
        str(slow.statuses[503]),
        str(otherwise or 0),
        f"{slow.most_bytes / MIB:,.0f}",
        f"{alone:.1f}",
        f"{p99:.1f}",
        str(len(beside.answers)),
        str(refused),
    ]
    is_bounded = slow.most_bytes <= MOST_BYTES and p99 <= MOST_SLOWER * alone
    return row, is_bounded and not otherwise and not refused and "" not in slow.retry_after


def main() -> int:
    """Print the table; the exit status says whether all of it is within bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--plane", choices=("tuned", "serve-run"), action="append")
    given = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    all_bounded = True
    for plane in given.plane or ("tuned", "serve-run"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "workers").mkdir()
            (folder / "workers" / "m.toml").write_text(workers.fake("m"))
            with serve(folder / "workers", folder, tuned=plane == "tuned") as server:
                row, is_bounded = measure(server, Crowd(given.clients, given.seconds))
        print("| " + " | ".join([plane, *row]) + " |", flush=True)
        all_bounded = all_bounded and is_bounded
    return 0 if all_bounded else 1


if __name__ == "__main__":
    sys.exit(main())
