"""Us beside the others, in one run: `make bench`.

Every round starts every contestant once, alone on the machine, in alternating order, and asks it all
workloads. The tables show medians over the rounds; `benchmarks/results/` keeps every single value. A run
during which other programs took more than `QUIET` of the machine is repeated, for whoever it was.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report
from benchmarks.results import FOLDER, MEMORY, START, Results, Value, machine, shown
from benchmarks.rivals import CONTESTANTS, Contestant, Running
from benchmarks.subjects import SHAPES, Subject, bundled, gpu_names, tiny
from benchmarks.workloads import WORKLOADS, Workload, write_reference
from deployments.machine import cores_here

NAME = "bench"
ROUNDS = 3
SECONDS, WARM_UP_SECONDS = 2.0, 0.5
# Of all cores; what is above it was no fair measurement.
QUIET = 0.1
TRIES = 2


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
    reference: Path | None
    subject: Subject

    def measure(self, name: str, running: Running, workload: Workload) -> Value:
        """Ask a contestant for a workload, again where others disturbed it; return the quietest run."""
        tries: list[Value] = []
        while not tries or (tries[-1].others > QUIET and len(tries) < TRIES):
            wall, busy = time.monotonic(), busy_seconds()
            own = own_seconds() + running.cpu_seconds()
            warm_up = max(WARM_UP_SECONDS, workload.warm_up)
            result = running.send(workload, self.seconds, warm_up, str(self.reference or ""))
            if result.errors or not result.latencies:
                raise RuntimeError(f"{name}, {workload.name}: {result.errors or 'no answer'}")
            own = own_seconds() + running.cpu_seconds() - own
            wall = (time.monotonic() - wall) * cores_here()
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
            contestant.start(Path(folder), self.subject) as running,
        ):
            values = [Value(name, START, self.number, round(running.seconds, 2))]
            for each in self.workloads:
                warm_up = each.warm_up if contestant.cached else 0.0
                workload = replace(each, models=(self.subject.name,), warm_up=warm_up)
                if contestant.takes(workload):
                    value = self.measure(name, running, workload)
                    values.append(value)
                    say(f"{name}: {workload.name}: {shown(value.value)} {workload.measure}", value.others)
            values.append(Value(name, MEMORY, self.number, round(running.pss() / 2**20)))
            say(f"{name}: {shown(values[0].value)} s to the first embedding, {shown(values[-1].value)} MiB")
        return values


def say(text: str, others: float = 0.0) -> None:
    """Tell how far it is; the tables go to standard output."""
    print(f"{text} (others {others:.0%})" if others > QUIET else text, file=sys.stderr, flush=True)


# --- the command -----------------------------------------------------------------------------------------


def main() -> int:
    """Measure, keep the results, print the tables; a full run goes into benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each run")
    parser.add_argument("--contestants", default="", help="numbers of those in CONTESTANTS, by comma")
    parser.add_argument("--workloads", default="", help="numbers of those in WORKLOADS, by comma")
    parser.add_argument("--name", default=NAME, help="of the files in the folder")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the results go")
    parser.add_argument("--resume", action="store_true", help="go on with the file that is there")
    parser.add_argument("--show", action="store_true", help="tables and plot of the file that is there")
    parser.add_argument("--gpu", action="store_true", help="Qwen3-Embedding's shapes on a GPU instead")
    parser.add_argument("--tiny", action="store_true", help="a model that costs next to nothing instead")
    given = parser.parse_args()
    file: Path = given.folder / f"{given.name}.json"
    # An orderly end, so that no contestant is left behind; a background job ignores SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if given.gpu:
        return run_on_gpus(given)
    if given.tiny:
        return run_tiny(given)
    if not given.show:
        contestants = chosen(CONTESTANTS, given.contestants)
        workloads = chosen(WORKLOADS, given.workloads)
        turn = Round(0, workloads, given.seconds, None, bundled())
        with tempfile.TemporaryDirectory() as folder:
            turn = replace(turn, reference=Path(folder, "reference.npy"))
            write_reference(Path(folder, "reference.npy"))
            run(turn, given.rounds, file, contestants, given.resume)
    results = Results.load(file)
    text = report.tables(results)
    print(text)
    file.with_suffix(".md").write_text(f"{text}\n")
    report.plot(results, file.with_suffix(".png"))
    if file == FOLDER / f"{NAME}.json":
        report.insert(report.NOTES, NAME, text)
    return 0


def run(turn: Round, rounds: int, file: Path, contestants: list[Contestant], resume: bool) -> None:
    """Play all rounds, or with `resume` those that aren't there yet; keep them after each contestant."""
    settings = {"engine": turn.subject.engine_settings(), "seconds": turn.seconds, "rounds": rounds}
    results = Results.load(file) if resume and file.exists() else Results(machine(), settings)
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            if number not in results.rounds(contestant.name):
                results.values += replace(turn, number=number).play(contestant)
                results.save(file)


def run_on_gpus(given: argparse.Namespace) -> int:
    """Measure shapes without weights on the GPU here; their vectors have no reference."""
    gpus = gpu_names()
    if not gpus:
        print("no GPU here: nvidia-smi names none", file=sys.stderr)
        return 1
    contestants = [c for c in chosen(CONTESTANTS, given.contestants) if c.on_gpus]
    workloads = chosen(WORKLOADS, given.workloads)
    for shape in SHAPES:
        file = given.folder / f"gpu-{shape.name}.json"
        with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
            subject = shape.write(Path(folder), len(gpus))
            turn = Round(0, workloads, given.seconds, None, subject)
            run(turn, given.rounds, file, contestants, given.resume)
        text = report.gpu_tables(Results.load(file), gpus[0], shape.parameters)
        print(f"{shape.name} on one {gpus[0]}\n\n{text}\n")
        file.with_suffix(".md").write_text(f"{text}\n")
    return 0


def run_tiny(given: argparse.Namespace) -> int:
    """Measure what servers cost beside their model."""
    file = given.folder / "tiny.json"
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        turn = Round(0, chosen(WORKLOADS, given.workloads), given.seconds, None, tiny(Path(folder)))
        run(turn, given.rounds, file, chosen(CONTESTANTS, given.contestants), given.resume)
    text = report.tables(Results.load(file))
    print(text)
    file.with_suffix(".md").write_text(f"{text}\n")
    return 0


def chosen(everything: tuple[Any, ...], numbers: str) -> list[Any]:
    """Return those with these numbers, all by default."""
    return [everything[int(number)] for number in numbers.split(",")] if numbers else list(everything)


if __name__ == "__main__":
    sys.exit(main())
