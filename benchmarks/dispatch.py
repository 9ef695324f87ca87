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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import Seen, Stream, median
from benchmarks.routing import DEFAULT, LONE_CALL_SECONDS, OURS, measure
from tests.harness import workers
from tests.harness.server import Server, serve

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


def print_rows(rows: Rows) -> int:
    """Print a table as it grows; return the exit status, 1 if a bound was missed."""
    print("| what | measured | bound | met |\n|---|---|---|---|", flush=True)
    missed = 0
    for row in rows:
        print(row, flush=True)
        missed += not row.met
    return 1 if missed else 0


def slower(what: str, before: list[Seen], after: list[Seen], percent: int, bound: float | None = None) -> Row:
    """Return the row of a percentile's medians over the rounds, as a ratio."""
    alone, beside = (median([each.percentile(percent) for each in side]) for side in (before, after))
    what = f"{what}: p{percent} {beside:.0f} ms, alone {alone:.0f} ms"
    if bound is None:
        return Row(what, f"{beside / alone:.2f}x")
    return Row.at_most(what, beside / alone, bound, "x")


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
    yield slower("person beside bulk jobs", idle, busy, 50)
    yield slower("person beside bulk jobs", idle, busy, 99, bound=2)
    yield Row.at_least("bulk jobs alone, of the engine's tokens/s", median(alone) / MINILM_RATE, 0.9)
    yield Row("bulk jobs beside the person, of what they get alone", f"{median(mixed) / median(alone):.2f}")


# --- routing ----------------------------------------------------------------------------------------


def routing(rounds: int = 5, seconds: float = 25.0) -> Rows:
    """Calls of 10 to 2,000 tokens at random times, at 80% of four replicas, neither joined nor split."""
    took = measure("routing", rounds, seconds)
    calls = sum(map(len, took[OURS]))
    p99 = {name: [np.percentile(each, 99) * 1000 for each in rounds] for name, rounds in took.items()}
    ratios = [ours / theirs for ours, theirs in zip(p99[OURS], p99[DEFAULT], strict=True)]
    by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    ours, theirs = median(p99[OURS]), median(p99[DEFAULT])
    what = f"p99 of {calls} calls, median of rounds: {ours:.0f} ms; Ray Serve's router {theirs:.0f} ms"
    yield Row.at_most(f"{what} (by round {by_round})", median(ratios), 0.75, "x")


# --- splitting --------------------------------------------------------------------------------------


def splitting(rounds: int = 5) -> Rows:
    """One request of 2,048 inputs of mixed lengths, on four replicas and on one."""
    with tempfile.TemporaryDirectory() as calls:
        engine_args = f'token_seconds = 0.00004, calls_folder = "{calls}"'
        four = workers.fake("four", engine_args, "[deployment]\nnum_replicas = 4")
        with serving(one=workers.fake("one", engine_args.replace(calls, "")), four=four) as server:
            took: dict[str, list[float]] = {"one": [], "four": []}
            shares = []
            for number in range(-1, rounds):  # the first one measures the rate for the others
                for model, times in took.items():
                    before = calls_seen(Path(calls))
                    request = Stream(
                        server.url, model, each=1, inputs=2048, tokens=45, sigma=0.8, max_tokens=500
                    )
                    seen = replace(request, seed=number % 256).run()
                    assert [answer.status for answer in seen.answers] == [200], seen
                    if number >= 0:
                        times.append(seen.answers[0].seconds)
                        if model == "four":
                            after = calls_seen(Path(calls))
                            shares.append([after[name] - before[name] for name in after])
    four_s, one_s = median(took["four"]), median(took["one"])
    what = f"2,048 inputs on 4 replicas {four_s:.2f} s, on one {one_s:.2f} s"
    yield Row.at_most(what, four_s / one_s, 0.3, "x")
    spreads = [(max(tokens) - min(tokens)) / (sum(tokens) / 4) for tokens in shares]
    yield Row.at_most(f"spread of the replicas' shares of its tokens, worst of {rounds}", max(spreads), 0.1)


def calls_seen(folder: Path) -> dict[str, int]:
    """Return the tokens that each engine was given so far."""
    return {file.name: sum(map(int, file.read_text().split())) for file in folder.iterdir()}


# --- overload ---------------------------------------------------------------------------------------


def overload(seconds: float = 65.0) -> Rows:
    """Three times what a model can do, all at random times, each request a new text."""
    more = "[limits]\nrequest_timeout_s = 2"
    with serving(m=workers.fake("m", "token_seconds = 0.0001", more)) as server:
        requests = Stream(server.url, "m", tokens=200)
        sender = replace(requests, clients=32, seconds=15.0)
        begun = time.monotonic()
        capacity = sender.run().rate(begun + 5, begun + 15)
        # An ingress replica grows by some 50 MiB over its first ten thousand requests, and then no more.
        replace(requests, rate=350, seconds=32.0, seed=2).run()
        memory = {}
        with replace(requests, rate=3 * capacity / 200, seconds=seconds, seed=1).running() as seen:
            begun = time.monotonic()
            for moment in (20.0, 60.0):
                time.sleep(max(0.0, begun + moment - time.monotonic()))
                memory[moment] = sum(pss(server))
    steady = seen.between(begun + 5, begun + 60)
    refused = steady.of(503)
    yield Row(
        f"offered {3 * capacity:,.0f} tokens/s to a model of {capacity:,.0f}; answered requests' p99",
        f"{steady.of(200).percentile(99):.0f} ms",
    )
    yield Row.at_least("goodput, of the capacity", steady.tokens / 55 / capacity, 0.95)
    # Others on this machine stall it now and then, and one stall would be the p99 of all.
    windows = [refused.between(begun + at, begun + at + 5).percentile(99) for at in range(5, 60, 5)]
    overall = f"{refused.percentile(99):.0f} ms over all"
    what = f"p99 of {len(refused.answers)} refusals, median over 5 s each ({overall})"
    yield Row.at_most(what, median(windows), 100, " ms")
    odd = Counter(
        f"{a.status} {a.code}"
        for a in steady.answers
        if a.status != 200 and (a.status, a.code, a.retry_after.isdecimal()) != (503, "queue_full", True)
    )
    what = "answers but 200 and 503 queue_full with Retry-After, of all"
    yield Row.at_most(f"{what} {dict(odd) or ''}", sum(odd.values()) / len(steady.answers), 0.001)
    growth = (memory[60.0] / memory[20.0] - 1) * 100
    yield Row.at_most(f"memory after 60 s against 20 s ({memory[60.0] / 2**20:.0f} MiB PSS)", growth, 2, "%")


def pss(server: Server) -> Iterator[int]:
    """Return the memory of each of the server's processes, what is shared divided up."""
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            yield process.memory_full_info().pss


# --- joining ----------------------------------------------------------------------------------------


def joining(count: int = 1000) -> Rows:
    """What waits leaves together, and what doesn't have to wait isn't held back."""
    lone = workers.fake("lone", f"call_seconds = {LONE_CALL_SECONDS}")
    with serving(m=workers.fake("m", "call_seconds = 0.01"), lone=lone) as server:
        Stream(server.url, "m", each=20).run()
        before = calls_made(server)
        seen = Stream(server.url, "m", clients=256, each=1, seed=1).run()
        assert len(seen.of(200).answers) == 256
        calls = calls_made(server) - before
        whole = Stream(server.url, "lone", each=count, pause=0.005).run().percentile(50)
    yield Row.at_most("calls for 256 single inputs at once", calls, 256 / 8)
    joined, direct = (median(side) * 1000 for side in measure("lone", count))
    yield Row(
        "p50 of a lone input through the dispatch, against straight through the handle",
        f"{joined:.2f} ms, {direct:.2f} ms",
    )
    # There is no switch: what the dispatch adds is taken off what a whole request takes.
    what = f"p50 of a lone request {whole:.1f} ms, against the same without a dispatch"
    yield Row.at_most(what, whole / (whole - joined + direct), 1.05, "x")


def calls_made(server: Server) -> float:
    """Return how many calls the replicas have had."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == "embedding_call_inputs_count")


# --- neighbours -------------------------------------------------------------------------------------


def neighbours(rounds: int = 3, seconds: float = 10.0) -> Rows:
    """Somebody floods a model with three times what it can do; who else notices."""
    engine_args, more = "token_seconds = 0.0001", "[limits]\nrequest_timeout_s = 2"
    with serving(a=workers.fake("a", engine_args, more), b=workers.fake("b", engine_args, more)) as server:
        person = Stream(server.url, "a", seconds=seconds, pause=0.05, key="person")
        flood = Stream(server.url, "a", tokens=200, rate=150, key="flood")
        sides: dict[str, tuple[list[Seen], list[Seen]]] = {name: ([], []) for name in "ab"}
        for number in range(rounds):
            for model in sides:
                sides[model][0].append(replace(person, model=model, seed=2 * number).run())
            with replace(flood, seed=number).running():
                time.sleep(3)
                for model in sides:
                    sides[model][1].append(replace(person, model=model, seed=2 * number + 1).run())
    for model, who in (("b", "person on another model"), ("a", "another caller of the model")):
        idle, flooded = sides[model]
        before, after = ([seen.of(200) for seen in side] for side in (idle, flooded))
        yield slower(f"{who} beside a flood", before, after, 50)
        yield slower(f"{who} beside a flood", before, after, 99, bound=2 if model == "b" else None)
        answers = [answer for seen in flooded for answer in seen.answers]
        refused = sum(answer.status != 200 for answer in answers) / len(answers)
        yield Row.at_most(f"of {who}'s {len(answers)} requests refused", refused, 0)


PARTS: dict[str, Callable[[], Rows]] = {
    "interference": interference,
    "routing": routing,
    "splitting": splitting,
    "overload": overload,
    "joining": joining,
    "neighbours": neighbours,
}


def main() -> int:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parts = parser.parse_args().parts or list(PARTS)
    return print_rows(row for name in parts for row in PARTS[name]())


if __name__ == "__main__":
    sys.exit(main())
