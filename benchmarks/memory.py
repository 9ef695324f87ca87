"""Peak resident memory of the whole server, all its processes: `make bench-memory`.

Starts the bundled default, embeds batches for a while, and samples every process. RSS counts pages that
processes share once for each of them; PSS divides them up, so that its sum is what the machine has less.
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

import deployments
from benchmarks.rivals import WITHOUT_PANDAS
from tests.harness.server import Server, serve

BUNDLED = Path(deployments.__file__).parent / "workers"
LOAD_SECONDS = 20.0
SAMPLE_SECONDS = 1.0
MIB = 2**20


def sample(server: Server) -> Counter[str]:
    """Return RSS and PSS of all processes in bytes, and RSS by kind of process."""
    sizes: Counter[str] = Counter()
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            memory = process.memory_full_info()
            title = " ".join(process.cmdline())
            kind = "model replica" if "ServeReplica" in title and "ingress" not in title else "all else"
            sizes.update({"rss": memory.rss, "pss": memory.pss, f"rss of {kind}": memory.rss})
    return sizes


def load(url: str, stop: threading.Event) -> None:
    """Embed 64 texts at a time until told to stop."""
    texts = [f"Sentence number {number} of a batch that keeps the engine busy. " * 3 for number in range(64)]
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            client.post(f"{url}/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": texts})


def main() -> int:
    """Print the peaks in MiB as JSON."""
    stop = threading.Event()
    peaks: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, serve(BUNDLED, Path(folder), WITHOUT_PANDAS) as server:
        clients = [threading.Thread(target=load, args=(server.url, stop)) for _ in range(2)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < deadline:
            peaks |= sample(server)
            time.sleep(SAMPLE_SECONDS)
        stop.set()
        for client in clients:
            client.join()
    print(json.dumps({f"{name}, MiB": round(size / MIB) for name, size in sorted(peaks.items())}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
