"""Results → tables in markdown, a plot, and the part of this folder's page that shows them."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rivals
from benchmarks.results import MEMORY, START, Results, shown
from benchmarks.subjects import peak_of
from benchmarks.workloads import WORKLOADS, Workload, mean_tokens

UNITS = {w.name: w.measure for w in WORKLOADS} | {START: "seconds", MEMORY: "MiB (PSS)"}
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"
NOTES = Path(__file__).parent / "README.md"
COLUMNS = 3
COLOURS = ("#1b6ca8", "#9aa5b1")  # ours, and the others


@dataclass(frozen=True)
class Bound:
    """What we want to reach: our value as a ratio of somebody's, or so much time beside it."""

    workload: str
    against: str
    ratio: float
    plus: float = 0.0
    ours: str = rivals.US

    def row(self, results: Results) -> str | None:
        """Return a line of the table, or None where a value is missing."""
        ours, theirs = results.median(self.ours, self.workload), results.median(self.against, self.workload)
        if ours is None or theirs is None:
            return None
        less = is_time(self.workload)
        if self.plus:
            wanted, reached = f"≤ +{self.plus:g}", f"{ours - theirs:+.2f}"
            met = ours - theirs <= self.plus
        else:
            wanted, reached = f"{'≤' if less else '≥'} {self.ratio:g}", f"{ours / theirs:.2f}"
            met = ours / theirs <= self.ratio if less else ours / theirs >= self.ratio
        return f"| {self.workload} | {self.against} | {wanted} | {reached} | {'yes' if met else '**no**'} |"


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


def contestants(results: Results) -> list[str]:
    """Return who took part, in the order of the table."""
    return [c.name for c in rivals.CONTESTANTS if any(v.contestant == c.name for v in results.values)]


def measured(results: Results) -> list[str]:
    """Return what was measured, in the order of the table."""
    return [name for name in UNITS if any(v.workload == name for v in results.values)]


def ours_for(workload: str) -> str:
    """Return which of our servers a workload's ratios are of."""
    return rivals.US_CACHED if any(w.name == workload and w.cached for w in WORKLOADS) else rivals.US


def tables(results: Results) -> str:
    """Return the tables in markdown: a row for each workload, ratios beside the medians; then the bounds."""
    names = contestants(results)
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"Medians of the rounds on {machine['cores']} cores of an {machine['cpu']}, {machine['date']},"
        f" {versions}. In brackets: our value divided by this one (ours is `embedding-cluster serve`;"
        f" in the Zipf row, with its cache). A cache is off in every row but the Zipf one, and there in all"
        f" columns but the last.",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for workload in measured(results):
        ours = results.median(ours_for(workload), workload)
        cells = []
        for contestant in names:
            value = results.median(contestant, workload)
            if value is None:
                cells.append("")
            elif contestant == ours_for(workload) or ours is None:
                cells.append(f"**{shown(value)}**")
            else:
                cells.append(f"{shown(value)} ({ours / value:.2f})")
        lines.append(f"| {workload}, {UNITS[workload]} | {' | '.join(cells)} |")
    lines.append(f"| rounds | {' | '.join(str(len(results.rounds(name))) for name in names)} |")
    rows = [bound.row(results) for bound in _bounds()]
    lines += ["", "| workload | ours, as a multiple of | wanted | reached | met |", "|---|---|---|---|---|"]
    lines += [row for row in rows if row is not None]
    return "\n".join([*lines, "", checks(results)])


def gpu_tables(results: Results, gpu: str, parameters: float) -> str:
    """Return the medians, and as tokens per second and as a share of the GPU's bf16 peak."""
    names = contestants(results)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    peak = peak_of(gpu)
    for workload in WORKLOADS:
        cells = []
        for contestant in names:
            value = results.median(contestant, workload.name)
            if value is None:
                cells.append("")
                continue
            tokens = tokens_per_second(workload, value)
            share = f", {2 * parameters * tokens / peak:.1%} of the peak" if peak else ""
            cells.append(f"{shown(value)} {workload.measure}: {tokens:,.0f} tokens/s{share}")
        lines.append(f"| {workload.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", checks(results)])


def tokens_per_second(workload: Workload, value: float) -> float:
    """Return how many tokens a measured value stands for, by the mean length of the workload's texts."""
    tokens = mean_tokens(workload.kind)
    if workload.measure == "p50 ms":
        return 1000 * workload.clients * workload.inputs * tokens / value
    if workload.measure == "seconds":
        return workload.clients * workload.inputs * tokens / value
    return value * tokens * (workload.inputs if workload.measure == "requests/s" else 1)


def checks(results: Results) -> str:
    """Return a sentence on what was checked, and on how quiet the machine was."""
    runs = [v for v in results.values if v.requests]
    answers, compared = (sum(getattr(v, name) for v in runs) for name in ("requests", "checked"))
    others = [v.others for v in runs]
    return (
        f"{answers:,} answers were checked for their shape, and {compared:,} vectors against"
        f" float32: cosine ≥ {min(v.worst_cosine for v in runs):.5f}. The load generator took"
        f" {max(v.generator_cpu for v in runs):.1%} of a core at most. Other programs had"
        f" {statistics.median(others):.0%} of the machine in the median run, {max(others):.0%} at most."
    )


def plot(results: Results, file: Path) -> None:
    """Draw a panel for each workload: medians as bars, every round as a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    workloads = measured(results)
    names = contestants(results)
    rows = -(-len(workloads) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(16, 3.1 * rows), squeeze=False)
    for axis in axes.flat[len(workloads) :]:
        axis.axis("off")
    for axis, workload in zip(axes.flat, workloads, strict=False):
        present = [name for name in names if results.of(name, workload)][::-1]
        for place, name in enumerate(present):
            values = results.of(name, workload)
            axis.barh(place, statistics.median(values), color=COLOURS[not name.startswith("us,")])
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(present)), present, fontsize=7)
        better = "less" if is_time(workload) else "more"
        axis.set_title(f"{workload}\n{UNITS[workload]}, {better} is better", fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def insert(document: Path, name: str, text: str) -> None:
    """Put a text between a document's marks of that name, in the place of what stands there."""
    begin, end = (mark.format(name=name) for mark in (BEGIN, END))
    content = document.read_text()
    before, found, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{document.name} has no marks {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
