"""The server's life on a real Ray cluster: start, failure, death of a replica, end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.app.test_early_refusals import FETCH, check_the_ways_of_http_1
from tests.harness import workers
from tests.harness.fake import expected
from tests.harness.faults import FAULTS, FakeTexts, Fault, Load, Traffic, client, run
from tests.harness.prometheus import metric_of, names
from tests.harness.server import MARK, Server, free_port, program, serve, wait_for

pytestmark = pytest.mark.cluster
COUNTED = {
    "embedding_requests_total",
    "embedding_inputs_total",
    "embedding_local_calls_total",
    "embedding_call_inputs_count",
    "embedding_replicas",
    "embedding_replica_states",
    "embedding_retries_total",
    "embedding_cuts_total",
}
# What shows that a fault was met. A replica that is killed may have had no call at that moment.
MARKS = {"replica stopped": "embedding_cuts_total a"}
# `make faults` does these on both data planes.
ON_ONE_PLANE = {"replica stopped", "controller killed"}
# A text that ends the engine of `a`, and the token in it.
FATAL, FATAL_TOKEN = "Ж", 244
TWO_REPLICAS = "[deployment]\nnum_replicas = 2"
LARGE, TOO_LARGE = 40 * 2**20, "the body is over the limit of 33554432 bytes"


@pytest.fixture(scope="module", params=[True, False], ids=["tuned", "serve-run"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two fake models, one of them with two replicas, on either data plane."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "workers"
    config.mkdir()
    port = free_port()
    monitoring = f"[monitoring]\nmetrics_port = {port}"
    more = f"{TWO_REPLICAS}\n{monitoring}"
    (config / "a.toml").write_text(
        workers.fake("a", f"call_seconds = 0.01, fatal_token = {FATAL_TOKEN}", more)
    )
    (config / "b.toml").write_text(workers.fake("b"))
    (config / "c.toml").write_text(workers.fake("c", "start_seconds = 6.0", TWO_REPLICAS))
    with serve(config, folder, tuned=request.param, ingress_replicas=2) as server:
        server.metrics_port = port
        yield server


def replicas(server: Server, worker: str) -> list[psutil.Process]:
    """Return the processes of a worker's replicas."""
    return server.titled(f"ServeReplica:default:{worker}")


def test_two_models_answer_by_name(server: Server) -> None:
    """In order, with exact bits, over the SDK."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    texts = [f"text {number}" for number in range(100)]
    for model in "ab":
        answer = client.embeddings.create(model=model, input=texts)
        got = np.array([item.embedding for item in answer.data], np.float32)
        assert np.array_equal(got, expected(texts))


def counts(url: str) -> dict[str, float]:
    """Return what is counted, by name and worker or model, once all ingress replicas can tell."""
    answers: list[httpx.Response] = []

    def are_told() -> bool:
        answers.append(httpx.get(url, timeout=30))
        # One that is just being replaced makes it 503: an incomplete count is none.
        return answers[-1].is_success

    wait_for(are_told, 60, lambda: answers[-1].text)
    families = text_string_to_metric_families(answers[-1].text)
    samples = [sample for family in families for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        who = sample.labels.get("model") or sample.labels.get("worker", "")
        if sample.name == "embedding_replica_states":
            who += f" {sample.labels['state']}"
        if sample.name in COUNTED:
            found[f"{sample.name} {who}"] = found.get(f"{sample.name} {who}", 0) + sample.value
    return found


def status(server: Server) -> dict[str, Any]:
    """Return what is told of `a`, with the whole answer as `told`, once all ingress replicas can tell."""
    answers: list[httpx.Response] = []

    def are_told() -> bool:
        answers.append(httpx.get(f"{server.url}/v1/status", timeout=30))
        return answers[-1].is_success

    wait_for(are_told, 60, lambda: answers[-1].text)
    told = answers[-1].json()
    (found,) = (each for each in told["models"] if each["deployment"] == "a")
    return {**found, "told": told}


def test_the_status_is_that_of_all_ingress_replicas(server: Server) -> None:
    """To the request; the command prints it, and says by its exit status that all is well."""
    before = status(server)["requests"]

    def send(number: int) -> None:
        body = {"model": "a", "input": f"{number} of the status"}
        httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).raise_for_status()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(60)))
    looks = []  # each ingress replica keeps its own for a while

    def are_counted() -> bool:
        looks.append(status(server))
        return bool(looks[-1]["requests"] >= before + 60)

    wait_for(are_counted, 30, lambda: str(looks[-1]))
    found = looks[-1]
    assert found["requests"] == before + 60
    assert (found["engine"], found["replicas"], found["ready"]) == ("fake", {"running": 2}, True)
    assert found["capacity_tokens_per_second"] > 0
    assert 0 < found["p50_seconds"] <= found["p99_seconds"]
    assert found["told"]["ingress_replicas"] == 2
    assert found["told"]["problems"] == []
    # Each ingress replica keeps its slots by itself.
    wait_for(lambda: sum(status(server)["series"]["requests"]) >= 60, 30, lambda: str(status(server)))
    command = [program("embedding-cluster"), "status", server.url]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["MODEL", "a", "b", "c"]


def test_metrics_agree_with_what_was_sent(server: Server) -> None:
    """To the request, over both ingress replicas: on `/metrics`, and of one worker on its own port."""
    before = counts(f"{server.url}/metrics")

    def send(number: int) -> None:
        body = {"model": "a", "input": [f"{number}", f"{number} again"]}
        httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).raise_for_status()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(200)))
    after = counts(f"{server.url}/metrics")
    assert after["embedding_requests_total a"] - before.get("embedding_requests_total a", 0) == 200
    assert after["embedding_inputs_total a"] - before.get("embedding_inputs_total a", 0) == 400
    # All but what was sent while the connections were made.
    local = after["embedding_local_calls_total a"] - before.get("embedding_local_calls_total a", 0)
    calls = after["embedding_call_inputs_count a"] - before.get("embedding_call_inputs_count a", 0)
    assert calls / 2 < local <= calls
    assert after["embedding_replicas a"] == after["embedding_replica_states a running"] == 2
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    told = {family.name for family in families}
    assert {metric_of(name) for name in names("embedding_")} <= told  # what the dashboard asks for
    own = counts(f"http://127.0.0.1:{server.metrics_port}/metrics")
    assert own["embedding_inputs_total a"] == after["embedding_inputs_total a"]
    assert not any(name.endswith(" b") for name in own)


def test_a_large_answer_crosses_every_message_limit(server: Server) -> None:
    """2,048 inputs of some 100 tokens each: beyond gRPC's default of 4 MiB both ways, as floats."""
    texts = [f"{number:05d}" * 20 for number in range(2048)]
    body = {"model": "a", "input": texts}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()
    got = np.array([item["embedding"] for item in answer["data"]], np.float32)
    assert np.array_equal(got, expected(texts))


def test_a_refusal_is_read_while_the_body_still_comes(server: Server, tmp_path: Path) -> None:
    """With a length or in chunks, on one connection, by OpenAI's client and Node's; no connection breaks."""

    def chunks() -> Iterator[bytes]:
        for _ in range(LARGE // 2**20):
            yield b" " * 2**20

    with httpx.Client(base_url=server.url, timeout=60) as http:
        for content in (b" " * LARGE, chunks(), b" " * LARGE):
            answer = http.post("/v1/embeddings", content=content)
            assert (answer.status_code, answer.json()["error"]["message"]) == (413, TOO_LARGE)
        assert http.get("/v1/models").status_code == 200
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as sdk,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        sdk.embeddings.create(model="a", input="x" * LARGE)
    assert caught.value.status_code == 413
    if shutil.which("node"):
        url = f"{server.url}/v1/embeddings"
        command = ["node", "--input-type=module", "-e", FETCH, url, "unused", str(LARGE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.stdout.split() == ["413"] * 3, result.stderr


def test_the_ways_of_http_1(server: Server) -> None:
    """On either data plane."""
    check_the_ways_of_http_1(int(server.url.rpartition(":")[2]), b'{"model":"a","input":"x"}')


def test_a_text_that_ends_engines_ends_two_and_fails_alone(server: Server) -> None:
    """It isn't brought to a third, and clients are told not to bring it again; 39 strangers are served."""
    wait_for(lambda: len(replicas(server, "a")) == 2, 90, "two replicas")
    before = {process.pid for process in replicas(server, "a")}

    def ask(number: int) -> httpx.Response:
        body = {"model": "a", "input": FATAL if number == 20 else f"text {number}"}
        return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=120)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    fatal = answers.pop(20)
    assert (fatal.status_code, fatal.json()["code"]) == (500, "internal_error"), fatal.text
    assert fatal.json()["error"]["message"].startswith("two replicas ended while they embedded this")
    assert fatal.headers["x-should-retry"] == "false"
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    got = [answer.json()["data"][0]["embedding"] for answer in answers]
    assert np.array_equal(np.array(got, np.float32), expected([f"text {n}" for n in range(40) if n != 20]))
    wait_for(lambda: not before & {each.pid for each in replicas(server, "a")}, 60, "both have ended")
    wait_for(lambda: len(replicas(server, "a")) == 2, 90, "two others")


def test_a_taken_port_is_told_before_anything_starts(server: Server, tmp_path: Path) -> None:
    """Rather than after the models are loaded."""
    config = tmp_path / "a.toml"
    config.write_text(workers.fake("a"))
    command = [program("embedding-cluster"), "serve", "--port", server.url.rpartition(":")[2], str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Address already in use" in result.stderr
    assert "starting Ray" not in result.stdout


SURVIVED = [fault for fault in FAULTS if not fault.two_nodes and not fault.ranks]


@pytest.mark.parametrize("fault", SURVIVED, ids=lambda fault: fault.name.replace(" ", "-"))
def test_nothing_is_lost_when_a_process_dies(server: Server, fault: Fault) -> None:
    """Under the load of 8 clients: every answer arrives and is right; a replica is replaced."""
    if fault.name in ON_ONE_PLANE and not server.titled("haproxy.cfg"):
        pytest.skip("met on the other data plane")
    wait_for(lambda: len(replicas(server, "a")) == 2, 90, "two replicas")
    before = {process.pid for process in replicas(server, "a")}
    counted = counts(f"{server.url}/metrics")
    result = run(server, fault, "a", before=2.0, after=5.0)
    if result is None:
        pytest.skip("this data plane has no such process")
    load, row = result
    assert not load.lost, (row, load.lost[:3])
    assert load.wrong == 0
    assert len(load.began) > 20
    if mark := MARKS.get(fault.name):
        assert counts(f"{server.url}/metrics")[mark] > counted.get(mark, 0)
    if "{model}" in fault.title:
        new = lambda: {process.pid for process in replicas(server, "a")} - before  # noqa: E731
        wait_for(lambda: len(new()) == 1, 90, "a replica in its place")


def test_a_model_without_replicas_says_so_and_comes_back(server: Server) -> None:
    """503 with Retry-After inside the deadline; the other model's clients notice nothing."""
    body = {"model": "c", "input": "hello"}
    url = f"{server.url}/v1/embeddings"
    wait_for(lambda: len(replicas(server, "c")) == 2, 90, "two replicas")
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    seen, stop, traffic = Load(), threading.Event(), Traffic(server.url, "b", 0, FakeTexts())
    others = [threading.Thread(target=client, args=(traffic, seen, stop)) for _ in range(4)]
    for each in others:
        each.start()
    try:
        for process in replicas(server, "c"):
            process.kill()
        # Later than that Ray Serve would answer itself, with 408.
        answer = httpx.post(url, json=body, headers={"x-request-timeout-seconds": "4"}, timeout=60)
        assert answer.status_code == 503, answer.text
        assert answer.json()["code"] == "model_unavailable"
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx.post(url, json=body, timeout=60).status_code == 200  # held until one is there
    finally:
        stop.set()
        for each in others:
            each.join()
    assert not seen.lost
    assert not seen.wrong
    assert len(seen.began) > 20


def test_a_worker_that_cant_start_leaves_the_others_serving(tmp_path: Path) -> None:
    """The reason is told at the first try, and stands in the table; the other model answers."""
    config = tmp_path / "workers"
    config.mkdir()
    (config / "good.toml").write_text(workers.fake("good"))
    (config / "bad.toml").write_text(workers.fake("bad", 'start_error = "no luck"'))
    with start(config, tmp_path) as (process, url, log):
        wait_for(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 120, "the table")
        assert process.poll() is None, log.read_text()
        assert "bad: can't start: worker bad: no luck" in log.read_text()
        assert "failed: worker bad: no luck" in log.read_text()
        body = {"model": "good", "input": "x"}
        assert httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).status_code == 200
        ready = httpx.get(f"{url}/ready", timeout=60)
        assert ready.status_code == 503
        assert {m["deployment"]: m["ready"] for m in ready.json()["models"]} == {"bad": False, "good": True}


def test_a_signal_while_models_load_leaves_no_process(tmp_path: Path) -> None:
    """The end is as orderly before the server is ready."""
    config = tmp_path / "slow.toml"
    config.write_text(workers.fake("slow", "start_seconds = 600.0"))
    with start(config, tmp_path) as (process, _, log):
        wait_for(lambda: "slow: 1 starting" in log.read_text(), 60, "loading")
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0, log.read_text()


def test_a_broken_worker_file_ends_the_start_with_all_mistakes(tmp_path: Path) -> None:
    """Exit status 2, before anything is started."""
    config = tmp_path / "broken.toml"
    config.write_text(workers.fake("broken").replace("edition = 1", "edition = 7"))
    with start(config, tmp_path) as (process, _, log):
        assert process.wait(300) == 2
        assert "broken.toml: edition: must be 1, not 7" in log.read_text()


@contextlib.contextmanager
def start(config: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Start the command without waiting for it; assert at the end that it left no process."""
    port, mark, log = free_port(), f"{os.getpid()}-{time.time_ns()}", folder / "log"
    command = [sys.executable, "-m", "deployments", "serve", "--port", str(port), str(config)]
    environ = {**os.environ, MARK: mark, "RAY_AUTH_MODE": "disabled"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        yield process, url, log
    finally:
        Server(url, process, log, mark).stop()


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    """Not even HAProxy, which has a session of its own."""
    config = tmp_path / "a.toml"
    config.write_text(workers.fake("a"))
    with serve(config, tmp_path) as server:
        assert server.titled("haproxy.cfg")
        server.process.kill()
        wait_for(lambda: not server.processes(), 60, lambda: str(server.processes()))
