"""What each request costs, in CPU-microseconds by process and stage: `make profile`.

Two runs of each workload on the tuned start. In the first nothing watches: processes and threads tell how
much CPU they took, and the server's own metrics how long its stages were. In the second py-spy samples the
ingress and the model's replica; a process's cost is divided up by what its samples stand in.
"""

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import report
from benchmarks.rivals import Running, ours
from benchmarks.subjects import bundled
from benchmarks.workloads import WORKLOADS, Workload
from deployments.config.worker import BATCHES_NAME, INGRESS_NAME, RATES_NAME
from tests.harness.server import program

SECONDS, WARM_UP_SECONDS = 5.0, 1.0
SAMPLES_PER_SECOND = 200
INGRESS, REPLICA, FRONT, RAY = "ingress", "replica", "front", "Ray and Serve"

# A sample belongs to the first of these that its innermost frame stands in: `function (file:line)`.
STAGES = (
    ("metrics", r"prometheus_client"),
    ("parse", r"deployments/api/(openai|fields|tei)\.py.*"),
    ("encode", r"deployments/api/encoding\.py|\banswer \(deployments"),
    ("tokenise", r"deployments/(dispatch/prepare|engine/tokenizer/\w+)\.py"),
    ("auth and limits", r"deployments/(http/auth|keys/\w+|dispatch/admission)\.py"),
    ("transport: pickling", r"pickle"),
    (
        "transport: Serve's handle, gRPC",
        r"ray/serve/(handle|_private/(router|replica_result|request_router|grpc|default_impl|serialization))"
        r"|grpc/|deployments/transport/router\.py",
    ),
    ("dispatch", r"deployments/dispatch/(dispatch|calls|pace|work|meter|cache)\.py"),
    ("read and route", r"deployments/(http/\w+|dispatch/catalog)\.py"),
    ("engine: model", r"torch/|vllm/(model_executor|v1/(worker|attention|executor|sample|pool))"),
    ("engine: scheduling and output", r"vllm/"),
    ("token batches", r"deployments/engine/batch\.py"),
    ("engine: ours", r"deployments/engine/"),
    ("replica", r"deployments/replica/"),
    ("HTTP: starlette, fastapi", r"starlette/|fastapi/"),
    ("HTTP: Serve and uvicorn", r"uvicorn/|ray/serve/"),
    ("event loop", r"asyncio/|threading.py"),
)
# Ray's main thread waits there all the time.
WAITING = "Worker.main_loop"


def role(process: psutil.Process) -> str:
    """Return what a process is."""
    title = " ".join(process.cmdline())
    if "ServeReplica" in title:
        # What runs batches and counts rates stands beside the path of these requests, as Ray does.
        beside = any(f":{name}" in title for name in (BATCHES_NAME, RATES_NAME))
        return RAY if beside else INGRESS if f":{INGRESS_NAME}" in title else REPLICA
    # Under plain `serve run` the front is Ray Serve's own proxy.
    return FRONT if "haproxy -db" in title or "ProxyActor" in title else RAY


def roles(running: Running) -> Iterator[tuple[str, psutil.Process]]:
    """Yield all processes with what they are."""
    for process in running.processes():
        with contextlib.suppress(psutil.Error):
            yield role(process), process


def usage_of(running: Running) -> Counter[str]:
    """Return the CPU seconds of its processes since their start, by what they are."""
    cpu: Counter[str] = Counter()
    for kind, process in roles(running):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu[kind] += times.user + times.system
    return cpu


def stages_of(running: Running) -> dict[tuple[str, str], float]:
    """Return the sum and the count of each stage's seconds, as the server has measured them."""
    stages: defaultdict[tuple[str, str], float] = defaultdict(float)
    text = httpx.get(f"{running.server.url}/metrics", timeout=30).text
    for family in text_string_to_metric_families(text):
        if family.name == "embedding_stage_seconds":
            for sample in family.samples:
                kind = sample.name.rpartition("_")[2]
                if kind in {"sum", "count"}:
                    stages[sample.labels["stage"], kind] += sample.value
    return stages


def stage_of(stack: list[str]) -> str:
    """Return what a sample's stack, the innermost frame last, is doing."""
    for frame in reversed(stack):
        for name, pattern in STAGES:
            if re.search(pattern, frame):
                return name
    return "other"


def shares(folded: str) -> Counter[str]:
    """Return each stage's share of py-spy's folded stacks."""
    counts: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, number = line.rpartition(" ")
        frames = stack.split(";")
        if not frames[-1].startswith(WAITING):
            counts[stage_of(frames)] += int(number)
    total = counts.total() or 1
    return Counter({name: count / total for name, count in counts.items()})


@contextlib.contextmanager
def sampled(running: Running, seconds: float, folder: Path) -> Iterator[dict[str, Counter[str]]]:
    """Sample the ingress and the replica while the block runs; the shares are there afterwards."""
    found: dict[str, Counter[str]] = {}
    spies = {}
    for kind, process in roles(running):
        if kind in {INGRESS, REPLICA}:
            output = folder / f"{kind}.folded"
            command = [program("py-spy"), "record", "--pid", str(process.pid), "--format", "raw"]
            command += ["--rate", str(SAMPLES_PER_SECOND), "--duration", str(round(seconds)), "--nonblocking"]
            command += ["--output", str(output), "--full-filenames"]
            spies[kind] = (
                output,
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT),
            )
    yield found
    for kind, (output, spy) in spies.items():
        if spy.wait():
            raise RuntimeError(f"py-spy failed for the {kind}")
        found[kind] = shares(output.read_text())


def budget(running: Running, workload: Workload, seconds: float, folder: Path) -> Iterator[str]:
    """Yield the lines of one workload's table."""
    send = running.send
    send(workload, WARM_UP_SECONDS, 0.0, "")
    before, stages_before = usage_of(running), stages_of(running)
    result = send(workload, seconds, 0.0, "")
    spent, stages = usage_of(running), stages_of(running)
    spent.subtract(before)
    for stage, value in stages_before.items():
        stages[stage] -= value
    requests = len(result.latencies)
    with sampled(running, seconds, folder) as found:
        send(workload, seconds + WARM_UP_SECONDS, 0.0, "")
    each = {name: 1e6 * value / requests for name, value in spent.items()}
    yield (
        f"**{workload.name}**: {result.value(workload):.4g} {workload.measure};"
        f" {sum(each.values()):,.0f} CPU-µs a request, the load generator"
        f" {1e6 * result.cpu * seconds / requests:,.0f}; {sum(spent.values()) / seconds:.2f} cores busy."
    )
    yield ""
    yield "| where | stage | CPU-µs a request |"
    yield "|---|---|---|"
    for kind in (FRONT, INGRESS, REPLICA, RAY):
        yield f"| {kind} | all | {each.get(kind, 0):,.0f} |"
        for name, share in found.get(kind, Counter()).most_common():
            if share >= 0.01:
                yield f"| | {name} | {share * each[kind]:,.0f} |"
    yield ""
    yield "| the server's own timings | each, µs | a request, µs |"
    yield "|---|---|---|"
    for name in dict.fromkeys(name for name, _ in stages):
        seconds_in, count = stages[name, "sum"], stages[name, "count"]
        if count:
            yield f"| {name} | {1e6 * seconds_in / count:,.0f} | {1e6 * seconds_in / requests:,.0f} |"
    yield ""


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="0,1,2", help="numbers of those in WORKLOADS, by comma")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--samples", type=Path, help="a folder that keeps py-spy's folded stacks")
    parser.add_argument("--keep", action="store_true", help="put the tables into benchmarks/README.md")
    given = parser.parse_args()
    lines: list[str] = []
    # An orderly end, so that no server is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name,
        ours(Path(name), bundled()) as running,
    ):
        for number in given.workloads.split(","):
            folder = (given.samples or Path(name)) / number
            folder.mkdir(parents=True, exist_ok=True)
            for line in budget(running, WORKLOADS[int(number)], given.seconds, folder):
                print(line, flush=True)
                lines.append(line)
    if given.keep:
        report.insert(report.NOTES, "profile", "\n".join(lines).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
