"""What the benchmark says can be relied on: wrong answers are seen, numbers are read as they were written."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report, rivals
from benchmarks.budget import shares
from benchmarks.results import MEMORY, Results, Value
from benchmarks.sender import Result, Task, body_of
from benchmarks.simulation import MODELS, Cluster, Costs, Traffic, answers, tables
from benchmarks.subjects import SHAPES
from benchmarks.workloads import WORKLOADS, Checker, reference_texts

SINGLES = WORKLOADS[1]
COSTS = Costs(1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-9, 1e-3, 1e-3, 1e-4, 1e-5)


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    """A checker whose reference vectors all differ."""
    vectors = np.random.default_rng(0).standard_normal((len(reference_texts()), 8)).astype(np.float32)
    np.save(tmp_path / "reference.npy", vectors)
    return Checker(tmp_path / "reference.npy")


def answer(rows: Sequence[object]) -> bytes:
    """Return an answer in OpenAI's format."""
    return json.dumps({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}).encode()


def test_right_vectors_pass_in_both_formats(checker: Checker) -> None:
    """Numbers and base64 of the same vectors are compared with the reference."""
    texts = reference_texts()[:2]
    vectors = [checker._vectors[text] for text in texts]
    checker.check_answer(texts, answer([v.tolist() for v in vectors]), "float", 8)
    encoded = [base64.b64encode(v.tobytes()).decode() for v in vectors]
    checker.check_answer(texts, answer(encoded), "base64", 8)
    assert checker.cosines == pytest.approx([1.0] * 4)


def test_swapped_missing_short_and_infinite_vectors_are_seen(checker: Checker) -> None:
    """An answer whose vectors are right and in the wrong places is as wrong as one that lacks some."""
    texts = reference_texts()[:2]
    first, second = (checker._vectors[text].tolist() for text in texts)
    wrong = ([second, first], [first], [first[:4], second[:4]], [first, [float("inf")] * 8])
    for rows in wrong:
        with pytest.raises(AssertionError):
            checker.check(texts, np.asarray(rows, np.float32), 8)


def test_another_status_is_no_answer() -> None:
    """A refusal that is quick mustn't count."""
    with pytest.raises(AssertionError, match="status"):
        body_of(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")
    assert body_of(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n") == b"{}"


def test_answers_after_the_clock_dont_count_for_the_rate(checker: Checker) -> None:
    """What ends late is timed, and isn't part of the requests per second."""
    task = Task("", asdict(SINGLES), seconds=2.0, warm_up=0.0)
    result = Result.of(task, [(0.0, 1.0), (0.5, 1.5), (1.0, 3.0)], 2.0, checker)
    assert result.value(SINGLES) == 1.0
    assert len(result.latencies) == 3


@pytest.fixture
def results() -> Results:
    """Two contestants in two rounds; ours is twice as fast, in the median."""
    values = [
        Value(name, SINGLES.name, number, value * (1 + number), requests=3)
        for name, value in ((rivals.US, 200.0), (rivals.VLLM, 100.0))
        for number in (0, 1)
    ]
    machine = {"cores": 2, "cpu": "EPYC", "date": "2026-11-22", "versions": {"ray": "2.60.0"}}
    return Results(machine, {"rounds": 2}, values)


def test_the_table_shows_medians_ratios_and_bounds(results: Results) -> None:
    """A bound that is kept says yes; the ratio is of medians."""
    text = report.tables(results)
    assert f"| {SINGLES.name}, requests/s | **300** | 150 (2.00) |" in text
    assert f"| {SINGLES.name} | {rivals.VLLM} | ≥ 1.25 | 2.00 | yes |" in text


def test_results_come_back_as_they_were_saved(results: Results, tmp_path: Path) -> None:
    """A run goes on after an interruption: only what came to its end counts as played."""
    results.values.append(Value(rivals.US, MEMORY, 0, 1.0))
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again == results
    assert again.rounds(rivals.US) == {0}
    assert again.rounds(rivals.VLLM) == set()


def test_the_readme_gets_its_table_between_its_marks(tmp_path: Path) -> None:
    """Twice the same; without marks nothing is written."""
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nb\n")
    for _ in range(2):
        report.insert(file, "bench", "new")
        assert file.read_text() == "a\n<!-- bench: begin -->\nnew\n<!-- bench: end -->\nb\n"
    with pytest.raises(ValueError, match="marks"):
        report.insert(file, "other", "new")


def test_samples_are_divided_up_by_stage() -> None:
    """The innermost frame that is known decides; a thread that waits counts for nothing."""
    folded = (
        "run (uvicorn/server.py:1);encode (deployments/engine/tokenizer/__init__.py:28) 3\n"
        "run (uvicorn/server.py:1);observe (prometheus_client/metrics.py:667) 1\n"
        "Worker.main_loop (ray/_private/worker.py:1) 96\n"
    )
    assert shares(folded) == {"tokenise": 0.75, "metrics": 0.25}


def test_simulated_requests_take_their_own_time_and_no_less() -> None:
    """At little load nothing waits; near the capacity it does, and the GPU is busy as it should be."""
    traffic = Traffic(64, 20, True)
    cluster = Cluster(MODELS[1], traffic, COSTS, ingresses=4, gpus=1)
    own = COSTS.ingress(traffic, MODELS[1].dimension)
    python = COSTS.replica_call + COSTS.replica_step + 64 * COSTS.replica_input
    alone = own + python + 64 * 20 / MODELS[1].tokens_per_second
    calm = cluster.run(0.01 * cluster.capacity, 500)
    assert calm.p50 == pytest.approx(alone)
    busy = cluster.run(0.9 * cluster.capacity, 5000)
    assert busy.p99 > 2 * alone
    assert busy.gpu_busy == pytest.approx(0.9 * cluster.capacity * 1280 / 1.6e6, rel=0.1)


def test_the_simulation_answers_for_every_model() -> None:
    """A small case of the whole: the least ingress replicas, more GPUs, the choice among replicas."""
    shown = answers(COSTS, 20)
    assert {need["model"] for need in shown["needs"]} == {model.name for model in MODELS}
    assert all(need["ingresses"] >= 1 and 0 < need["gpu"] <= 1 for need in shown["needs"])
    assert all(routed["seconds"] > 0 for routed in shown["routing"])
    assert tables(COSTS, shown).count("\n") > len(shown["needs"])


def test_shapes_have_the_parameters_of_their_names() -> None:
    """Without the vocabulary's: 0.44 of 0.6 billion, 6.95 of 8 billion."""
    assert [shape.parameters for shape in SHAPES] == pytest.approx([0.44e9, 6.95e9], rel=0.01)
