"""Metrics: every name once, exact counts, closed labels, and the same over several processes."""

import asyncio
import gc
import weakref

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments import errors
from deployments.batches.lines import Bulk
from deployments.dispatch.catalog import Catalog
from deployments.dispatch.workers import Workers
from deployments.engine.batch import TokenBatch
from deployments.http.serving import Serving
from deployments.metrics import CANCELLED, NO_MODEL, STAGES, SUCCESS, Metrics, merge
from deployments.plan.plan import ingress_config
from tests.app.conftest import NAMES, LocalHandle
from tests.unit.test_house import all_errors

FAMILIES = {
    "embedding_requests": "counter",
    "embedding_request_seconds": "histogram",
    "embedding_stage_seconds": "histogram",
    "embedding_inputs": "counter",
    "embedding_tokens": "counter",
    "embedding_call_inputs": "histogram",
    "embedding_call_tokens": "histogram",
    "embedding_batch_lines": "counter",
    "embedding_local_calls": "counter",
    "embedding_joined_parts": "counter",
    "embedding_split_parts": "counter",
    "embedding_shared_inputs": "counter",
    "embedding_cache_hits": "counter",
    "embedding_cold_start_seconds": "histogram",
    "embedding_queued_tokens": "gauge",
    "embedding_cache_bytes": "gauge",
    "embedding_retries": "counter",
    "embedding_cuts": "counter",
    "embedding_outstanding_tokens": "gauge",
    "embedding_replicas": "gauge",
    "embedding_capacity_tokens_per_second": "gauge",
    "embedding_key_requests": "counter",
    "embedding_key_tokens": "counter",
    "embedding_denied": "counter",
    "embedding_worker_info": "gauge",
}


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return every sample by name and labels, having checked that the families are the ones above."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert {family.name: family.type for family in families} == FAMILIES
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Return a sample's key."""
    return name, frozenset(labels.items())


async def test_counts_agree_with_what_was_sent(client: httpx.AsyncClient) -> None:
    """To the request, by model and outcome; inputs and tokens of the answers that were given."""

    async def send(body: dict[str, object]) -> None:
        await client.post("/embeddings", json=body)

    await asyncio.gather(*(send({"model": "a", "input": [f"text {n}", "same"]}) for n in range(40)))
    await asyncio.gather(*(send({"model": "a", "input": ""}) for _ in range(3)))
    await send({"model": "a", "input": "x" * 513})
    await send({"model": "nope", "input": "x"})
    await send({"model": "mute", "input": "x"})
    found = await scrape(client)
    requests = "embedding_requests_total"
    assert found[key(requests, model="a", outcome=SUCCESS)] == 40
    assert found[key(requests, model="a", outcome="context_length_exceeded")] == 1
    assert found[key(requests, model=NO_MODEL, outcome="invalid_request")] == 3
    assert found[key(requests, model=NO_MODEL, outcome="model_not_found")] == 1
    assert found[key(requests, model="mute", outcome="MISSING_CAPABILITY")] == 1
    assert found[key("embedding_inputs_total", worker="a")] == 80
    tokens = sum(len(f"text {n}") + len("same") for n in range(40))
    assert found[key("embedding_tokens_total", worker="a")] == tokens
    assert found[key("embedding_outstanding_tokens", worker="a")] == 0
    for stage in STAGES:
        assert found[key("embedding_stage_seconds_count", worker="a", stage=stage)] > 0, stage
    # Each input was either sent in a call or shared with one that was.
    sent = found[key("embedding_call_inputs_sum", worker="a")]
    assert sent + found[key("embedding_shared_inputs_total", worker="a")] == 80
    assert found[key("embedding_joined_parts_total", worker="a")] > 0


async def test_labels_come_from_closed_sets(client: httpx.AsyncClient) -> None:
    """Whatever clients send: a name that a client made up never becomes a label."""
    for number in range(20):
        await client.post("/embeddings", json={"model": f"made-up-{number}", "input": "x"})
    models = set(NAMES)
    outcomes = {kind.code for kind in all_errors()} | {SUCCESS, CANCELLED}
    for _, labels in await scrape(client):
        values = dict(labels)
        assert values.get("model", NO_MODEL) in models | {NO_MODEL}
        assert values.get("outcome", SUCCESS) in outcomes
        assert values.get("worker", "a") in models
        assert values.get("stage", "parse") in STAGES


@pytest.mark.parametrize("worker", [None, "a"])
async def test_several_processes_add_up(client: httpx.AsyncClient, worker: str | None) -> None:
    """Counts and buckets are sums; of one worker alone, the others' samples are left out."""
    for model in "ab":
        await client.post("/embeddings", json={"model": model, "input": "abc"})
    text = (await client.get("/metrics")).content
    merged = merge([text, text, text], worker and {worker})
    found = {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(merged.decode())
        for s in family.samples
    }
    assert found[key("embedding_tokens_total", worker="a")] == 9
    assert (key("embedding_tokens_total", worker="b") in found) == (worker is None)
    assert found[key("embedding_stage_seconds_bucket", worker="a", stage="call", le="+Inf")] == 3


def test_a_code_belongs_to_one_kind_of_error() -> None:
    """Else an outcome would mean two things; subclasses that only refine a message share it."""
    by_code: dict[str, list[type[errors.EmbeddingError]]] = {}
    for kind in all_errors():
        by_code.setdefault(kind.code, []).append(kind)
    shared = {code for code, kinds in by_code.items() if len(kinds) > 1}
    assert shared == {"internal_error"}


async def test_one_models_trouble_costs_no_other_its_retries(
    handles: dict[str, LocalHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first uses up all that it has; the second's replica dies once, and nobody notices."""
    monkeypatch.setattr("deployments.dispatch.calls.FIRST_PAUSE_SECONDS", 0.0)
    serving = Serving(Catalog({}), Metrics(), 1000)
    files = ingress_config(handles[name]._plan for name in "ab")["workers"]
    Workers(handles, serving.catalog, serving.metrics).take({"workers": files})  # type: ignore[arg-type]
    batch = TokenBatch.of([[1, 2]])

    async def ask(name: str) -> None:
        deadline = asyncio.get_running_loop().time() + 60
        await serving.catalog.dispatches[name].embed(batch, deadline)

    await asyncio.gather(ask("a"), ask("b"))
    handles["a"].failures = [errors.EngineDeadError("gone") for _ in range(1000)]
    for _ in range(40):
        with pytest.raises(errors.ModelUnavailableError):
            await ask("a")
    handles["b"].failures = [errors.EngineDeadError("gone")]
    await ask("b")


async def test_nothing_is_kept_of_a_worker_that_is_gone(handles: dict[str, LocalHandle]) -> None:
    """Neither its cache nor its rows; the others go on counting, and one that comes back begins anew."""
    metrics = Metrics()
    serving = Serving(Catalog({}), metrics, 1000)
    taken = Workers(handles, serving.catalog, serving.metrics)  # type: ignore[arg-type]
    files = ingress_config(handles[name]._plan for name in "ab")["workers"]
    bulk = Bulk(serving)
    taken.take({"workers": files})
    for model in "ab":
        await bulk.embed({"model": model, "input": "x"}, None)
        metrics.requests.labels(model, SUCCESS).inc()
    gone = weakref.ref(serving.catalog.dispatches["a"])
    files["b"]["queue"]["models"]["b2"] = files["b"]["queue"]["models"]["b"]
    taken.take({"workers": {"b": files["b"]}})
    gc.collect()
    assert gone() is None
    metrics.requests.labels("a", SUCCESS).inc()  # one that ends late
    text = metrics.text().decode()
    assert '"a"' not in text
    assert 'embedding_tokens_total{worker="b"} 1.0' in text
    assert 'embedding_requests_total{model="b",outcome="ok"} 1.0' in text
    info = 'embedding_worker_info{service_name="%s",service_role="Worker",version="1",worker="b"} 1.0'
    assert info % "worker" in text
    del files["b"]["queue"]["models"]["b"]
    files["b"]["queue"]["service_name"] = "search"
    taken.take({"workers": files})
    text = metrics.text().decode()
    assert info % "search" in text
    assert info % "worker" not in text
    assert 'model="b"' not in text
    assert 'embedding_tokens_total{worker="b"} 1.0' in text
    assert 'embedding_outstanding_tokens{worker="a"} 0.0' in text
    await bulk.embed({"model": "a", "input": "x"}, None)
    assert 'embedding_tokens_total{worker="a"} 1.0' in metrics.text().decode()
