"""What the dispatch does for speed, safety and fairness, measured on a real server: `make dispatch`.

Real Ray, the tuned data plane, the fake engine with a set service time that is long against what the rest of
the server computes, so that a machine of 2 cores can show what happens with many. A row for each measurement:
the number, its bound, whether it was met. Sides of a comparison alternate within a run. The exit status is 1
if a bound was missed.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.load import Stream, median
from benchmarks.routing import DEFAULT, OURS, measure
from tests import workers
from tests.server import Server, serve

# What all-MiniLM-L6-v2 takes on 2 cores, as measured: a step of any size, and each of its tokens.
MINILM = "call_seconds = 0.003, token_seconds = 0.000036"
MINILM_RATE = 1 / 0.000036


@dataclass(frozen=True)
class Row:
    """A line of the table; without a bound, for information."""

    what: str
    measured: str
    bound: str = ""
    met: bool = True

    @classmethod
    def at_most(cls, what: str, value: float, bound: float, unit: str = "") -> "Row":
        """Return a row whose value must not be above its bound."""
        return cls(what, f"{value:.3g}{unit}", f"≤ {bound:g}{unit}", value <= bound)

    @classmethod
    def at_least(cls, what: str, value: float, bound: float, unit: str = "") -> "Row":
        """Return a row whose value must not be below its bound."""
        return cls(what, f"{value:.3g}{unit}", f"≥ {bound:g}{unit}", value >= bound)

    def __str__(self) -> str:
        """Return the line."""
        met = ("yes" if self.met else "NO") if self.bound else ""
        return f"| {self.what} | {self.measured} | {self.bound} | {met} |"


Rows = Iterator[Row]


@contextlib.contextmanager
def serving(**files: str) -> Iterator[Server]:
    """Serve worker files of these names until the block ends."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "workers"
        config.mkdir()
        for worker, text in files.items():
            (config / f"{worker}.toml").write_text(text)
        with serve(config, folder) as server:
            yield server


# --- bulk work and people who wait ------------------------------------------------------------------


def interference(rounds: int = 5, seconds: float = 10.0) -> Rows:
    """One text at a time, alone and while two jobs send 512 at a time without a pause."""
    with serving(m=workers.fake("m", MINILM)) as server:
        person = Stream(server.url, "m", seconds=seconds, pause=0.02, key="person")
        job = Stream(server.url, "m", clients=2, inputs=512, tokens=40, sigma=0.5, max_tokens=500, key="job")
        person.run()
        idle, busy, alone, mixed = [], [], [], []
        for number in range(rounds):
            idle.append(replace(person, seed=2 * number).run())
            with replace(job, seed=number).running() as seen:
                time.sleep(2)
                begun = time.monotonic()
                time.sleep(seconds / 2)
                until = time.monotonic()
                busy.append(replace(person, seed=2 * number + 1).run())
                end = time.monotonic()
            alone.append(seen.rate(begun, until))
            mixed.append(seen.rate(until, end))
    for percent in (50, 99):
        before, after = (median([each.percentile(percent) for each in side]) for side in (idle, busy))
        what = f"person's p{percent} beside bulk jobs: {after:.0f} ms, alone {before:.0f} ms"
        if percent == 99:
            yield Row.at_most(what, after / before, 2, "x")
        else:
            yield Row(what, f"{after / before:.2f}x")
    yield Row.at_least("bulk jobs alone, of the engine's tokens/s", median(alone) / MINILM_RATE, 0.9)
    yield Row("bulk jobs beside the person, of what they get alone", f"{median(mixed) / median(alone):.2f}")


# --- routing ----------------------------------------------------------------------------------------


def routing(rounds: int = 3, seconds: float = 40.0) -> Rows:
    """Calls of 10 to 2,000 tokens at random times, at 80% of four replicas, neither joined nor split."""
    took = measure("routing", rounds, seconds)
    calls = sum(map(len, took[OURS]))
    p99 = {name: np.percentile(np.concatenate(took[name]), 99) * 1000 for name in took}
    ratios = ", ".join(
        f"{np.percentile(a, 99) / np.percentile(b, 99):.2f}"
        for a, b in zip(took[OURS], took[DEFAULT], strict=True)
    )
    what = f"p99 of {calls} calls: {p99[OURS]:.0f} ms; Ray Serve's router {p99[DEFAULT]:.0f} ms"
    yield Row.at_most(f"{what} (by round {ratios})", p99[OURS] / p99[DEFAULT], 0.75, "x")


PARTS: dict[str, Callable[[], Rows]] = {
    "interference": interference,
    "routing": routing,
}


def main() -> int:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parts = parser.parse_args().parts or list(PARTS)
    print("| what | measured | bound | met |\n|---|---|---|---|", flush=True)
    missed = 0
    for name in parts:
        for row in PARTS[name]():
            print(row, flush=True)
            missed += not row.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
