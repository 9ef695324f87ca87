"""What is shown of each model's last minutes: by route and on the command line."""

import asyncio
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.__main__ import main
from deployments.command import status as command
from deployments.errors import EngineDeadError, IncompleteError, ModelUnavailableError
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.http.serving import Serving
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from deployments.metrics import SECONDS, SUCCESS, Metrics
from deployments.status.history import SLOT_SECONDS, SLOTS, History, Minutes, merge
from deployments.status.look import LOOK_SECONDS, Counted
from deployments.status.report import DO, Replicas, quantile
from tests.app.conftest import NAMES, LocalHandle, make_serving
from tests.app.test_auth import KEYS, bearer


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        """Stand at the beginning of a slot."""
        self.now = 1_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Application:
    """An application of one ingress replica among others, and what the others and Ray Serve tell."""

    def __init__(self, handles: dict[str, LocalHandle], access: Access | None = None) -> None:
        """Tell nothing of others yet."""
        self.serving = make_serving(handles, access.rates if access else None)
        self.others: list[Serving] = []
        self.replicas: dict[str, Replicas] = {}
        self.looks = 0
        self.silent = False
        app = make_app(self.serving, self._texts, {}, access, gather_counts=self._counts)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://cluster/v1")

    async def _texts(self) -> list[bytes]:
        return [self.serving.metrics.text()]

    async def _counts(self) -> Counted:
        self.looks += 1
        if self.silent:
            raise IncompleteError("an ingress replica doesn't answer", None, 5.0)
        minutes = [each.history.minutes() for each in (self.serving, *self.others)]
        return Counted(minutes, [], self.replicas)

    async def told(self, **headers: str) -> Any:
        """Return what the route tells, which must be well."""
        response = await self.http.get("/status", headers=headers)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look anew at each question, unless a test says otherwise."""
    assert LOOK_SECONDS <= SLOT_SECONDS
    monkeypatch.setattr("deployments.status.look.LOOK_SECONDS", 0.0)


@pytest.fixture
def application(handles: dict[str, LocalHandle]) -> Application:
    """One without keys."""
    return Application(handles)


def model(told: Any, name: str = "a") -> Any:
    """Return what is told of a worker."""
    (found,) = (each for each in told["models"] if each["deployment"] == name)
    return found


async def test_the_numbers_are_those_of_all_ingress_replicas(
    application: Application, handles: dict[str, LocalHandle]
) -> None:
    """To the request, by code; what is of no model stands apart."""
    other = make_serving(handles)
    other.metrics.requests.labels("a", SUCCESS).inc(100)
    other.metrics.requests.labels("a", "queue_full").inc(3)
    other.metrics.tokens.labels("a").inc(1000)
    other.metrics.denied.labels("invalid_api_key").inc(2)
    other.metrics.batch_lines.labels("a", SUCCESS).inc(7)
    application.others = [other]
    for body in ({"model": "a", "input": ["x", "yy"]}, {"model": "a", "input": "x" * 513}, {"model": "nope"}):
        await application.http.post("/embeddings", json=body)
    told = await application.told()
    found = model(told)
    assert (found["requests"], found["tokens"], found["inputs"]) == (101, 1003, 2)
    assert found["errors"] == {"context_length_exceeded": 1, "queue_full": 3}
    assert (found["batch_lines"], found["batch_errors"], found["cancelled"]) == (7, {}, 0)
    assert told["errors"] == {"invalid_api_key": 2, "invalid_request": 1}
    assert told["ingress_replicas"] == 2
    assert (found["engine"], found["version"], found["models"]) == ("fake", 1, ["a"])
    assert [each["deployment"] for each in told["models"]] == NAMES
    assert model(told, "b")["requests"] == 0


async def test_an_ingress_replica_that_is_silent_leaves_no_half_of_the_numbers(
    application: Application,
) -> None:
    """As with `/metrics` and `/usage`."""
    application.silent = True
    response = await application.http.get("/status")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["message"] == "an ingress replica doesn't answer"


async def test_a_key_sees_its_own_models(handles: dict[str, LocalHandle]) -> None:
    """No other one's name or problems; what is of no model is the operators'."""
    application = Application(handles, Access(KeyRing(KEYS), LocalRates()))
    assert (await application.http.get("/status")).status_code == 401
    handles["b"].failures = [ModelUnavailableError("secret reason")] * 3
    response = await application.http.get("/status", headers=bearer("some"))
    told = response.json()
    assert [each["deployment"] for each in told["models"]] == ["a", "wide"]
    assert told["problems"] == []
    assert told["ready"]
    assert '"b"' not in response.text
    assert "errors" not in told
    assert "ingress_replicas" not in told
    everything = await application.told(**bearer("operator"))
    assert [each["deployment"] for each in everything["models"]] == NAMES
    assert everything["errors"] == {"invalid_api_key": 1}


# --- what isn't well ---------------------------------------------------------------------------------

FAILED = Replicas({"STARTING": 1}, "worker b: /models/b has no config.json")


@pytest.mark.parametrize(
    ("replicas", "what", "action"),
    [
        (Replicas(), "no replica answers: there is none", "none"),
        (Replicas({"STARTING": 2, "RUNNING": 0}), "no replica answers: 2 starting", "coming"),
        (Replicas({"RUNNING": 1}), "no replica answers: 1 running", "silent"),
        (FAILED, "can't start: worker b: /models/b has no config.json", "failed"),
    ],
)
async def test_what_isnt_ready_is_told_with_what_to_do(
    application: Application, handles: dict[str, LocalHandle], replicas: Replicas, what: str, action: str
) -> None:
    """By the states that Ray Serve sees, and what the engine said."""
    handles["b"].failures = [EngineDeadError("gone")] * 100
    application.replicas = {"a": Replicas({"RUNNING": 2}), "b": replicas}
    told = await application.told()
    assert not told["ready"]
    assert told["problems"] == [{"deployment": "b", "what": what, "action": DO[action]}]
    assert (model(told)["ready"], model(told)["replicas"]) == (True, {"running": 2})
    assert not model(told, "b")["ready"]


async def test_what_an_engine_said_is_the_operators(handles: dict[str, LocalHandle]) -> None:
    """It may name folders of a node."""
    application = Application(handles, Access(KeyRing(KEYS), LocalRates()))
    handles["b"].failures = [EngineDeadError("gone")] * 100
    application.replicas = {"b": FAILED}
    told = await application.told(**bearer("all"))
    assert told["problems"] == [{"deployment": "b", "what": "can't start", "action": DO["failed"]}]


# --- the last minutes --------------------------------------------------------------------------------


def test_a_slot_holds_what_was_counted_in_it() -> None:
    """What stands still takes no place; what is older than a quarter of an hour is gone."""
    metrics, clock = Metrics(), Clock()
    history = History(metrics, clock)
    first = int(clock.now // SLOT_SECONDS)
    metrics.requests.labels("a", SUCCESS).inc(5)
    clock.now += SLOT_SECONDS
    history.sample()
    clock.now += SLOT_SECONDS
    history.sample()
    metrics.requests.labels("a", SUCCESS).inc(2)
    metrics.outstanding.labels("a").set(7)
    requests, outstanding = ("requests", "a", SUCCESS), ("outstanding_tokens", "a")
    told = history.minutes()
    assert told == Minutes(first + 2, {requests: at(-3, 5, -1, 2), outstanding: at(-1, 7)})
    clock.now += SLOT_SECONDS
    told = history.minutes()  # though nobody has ended the slot before
    assert told == Minutes(first + 3, {requests: at(-4, 5, -2, 2), outstanding: at(-2, 7, -1, 7)})
    clock.now += (SLOTS - 2) * SLOT_SECONDS
    assert history.minutes().series[requests] == at(1, 2)


def test_a_slot_ends_once_however_the_clock_goes() -> None:
    """A timer that is early takes nothing from it; a clock that is set back leaves what was before that."""
    metrics, clock = Metrics(), Clock()
    history = History(metrics, clock)
    tokens = metrics.tokens.labels("a")
    tokens.inc(5)
    metrics.outstanding.labels("a").set(7)
    history.sample()
    metrics.outstanding.labels("a").set(0)
    tokens.inc(2)
    clock.now += SLOT_SECONDS
    assert history.minutes().series == {("tokens", "a"): at(-2, 7)}
    tokens.inc(1)
    clock.now += SLOT_SECONDS
    history.sample()
    clock.now -= SLOT_SECONDS
    assert history.minutes().series == {("tokens", "a"): at(-2, 7)}
    tokens.inc(3)
    assert history.minutes().series == {("tokens", "a"): at(-2, 7, -1, 3)}


def at(*pairs: int) -> list[float]:
    """Return a column that holds numbers in places, given in turn, and else nothing."""
    column = [0.0] * (SLOTS + 1)
    for place, number in zip(pairs[::2], pairs[1::2], strict=True):
        column[place] = float(number)
    return column


def test_a_worker_that_comes_back_counts_anew() -> None:
    """Its counters begin at nothing; nothing is taken off."""
    metrics, clock = Metrics(), Clock()
    history = History(metrics, clock)
    metrics.serve({("worker", "a")})
    metrics.tokens.labels("a").inc(100)
    clock.now += SLOT_SECONDS
    history.sample()
    metrics.serve(set())
    metrics.serve({("worker", "a")})
    metrics.tokens.labels("a").inc(30)
    assert history.minutes().series == {("tokens", "a"): at(-2, 100, -1, 30)}


async def test_slots_are_kept_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a task of the process's own, at the end of each."""
    monkeypatch.setattr("deployments.status.history.SLOT_SECONDS", 0.02)
    metrics = Metrics()
    history = History(metrics)
    history.start()
    history.start()
    metrics.tokens.labels("a").inc()
    async with asyncio.timeout(60):
        while not history._slots:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
    assert [each for each in history._slots.values() if each] == [{("tokens", "a"): 1.0}]
    assert history._task is not None
    history._task.cancel()


def test_of_what_all_processes_see_the_largest_counts() -> None:
    """The rest is added up."""
    replicas, tokens = ("replicas", "a"), ("tokens", "a")
    parts = [
        Minutes(7, {replicas: at(-1, 2), tokens: at(-1, 5, 0, 100)}),
        Minutes(8, {replicas: at(-2, 3), tokens: at(-2, 4, -1, 1)}),
    ]
    assert merge(parts) == Minutes(8, {replicas: at(-2, 3), tokens: at(-2, 9, -1, 1)})
    assert merge([Minutes(1, {tokens: at(-1, 5)}), Minutes(10_000, {})]).series == {tokens: at()}


async def test_series_and_quantiles_are_of_whole_slots(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ninety numbers of each, the latest last; the tokens of the last minute by the second."""
    clock = Clock()
    monkeypatch.setattr("deployments.status.look.time.time", clock)
    metrics = application.serving.metrics
    application.serving.history = History(metrics, clock)
    for seconds, count in ((0.004, 98), (4.0, 2)):
        for _ in range(count):
            metrics.request_seconds.labels("a").observe(seconds)
    metrics.requests.labels("a", SUCCESS).inc(98)
    metrics.requests.labels("a", "queue_full").inc(2)
    metrics.tokens.labels("a").inc(650)
    metrics.cache_hits.labels("a").inc(4)
    metrics.cold_start_seconds.labels("a").observe(3.0)
    metrics.capacity.labels("a").set_function(lambda: 1234.5)
    clock.now += SLOT_SECONDS + 5
    metrics.outstanding.labels("a").set_function(lambda: 12)
    found = model(await application.told())
    assert found["series"]["requests"] == [0] * (SLOTS - 1) + [100]
    assert found["series"]["errors"][-2:] == [0, 2]
    assert found["series"]["tokens"][-1] == 650
    assert found["series"]["p50_seconds"][-2:] == [None, pytest.approx(0.0025 + 0.0025 * 50 / 98, abs=1e-6)]
    assert found["p99_seconds"] == pytest.approx(2.5 + 2.5 / 2) == found["series"]["p99_seconds"][-1]
    assert all(len(numbers) == SLOTS for numbers in found["series"].values())
    assert found["tokens_per_second"] == 10.0  # over one minute and the five seconds of the open slot
    assert (found["capacity_tokens_per_second"], found["outstanding_tokens"]) == (1234, 12)
    assert (found["cache_hits"], found["cold_starts"], found["queued_tokens"]) == (4, 1, 0)
    clock.now += 31 * SLOT_SECONDS
    later = model(await application.told())
    assert (later["p99_seconds"], later["tokens_per_second"], later["requests"]) == (None, 0.0, 98)


@pytest.mark.parametrize(
    ("share", "buckets", "wanted"),
    [
        (0.5, {}, None),
        (0.5, {0.1: 10}, 0.075),
        (0.5, {1.0: 10}, 0.75),
        (0.5, {0.001: 4}, 0.0005),
        (0.5, {0.1: 4, 1.0: 10}, 0.5 + 0.5 / 6),
        (0.99, {math.inf: 5}, 60.0),
    ],
)
def test_a_quantile_is_that_of_prometheus(
    share: float, buckets: dict[float, int], wanted: float | None
) -> None:
    """Evenly within a bucket; beyond the last bound nothing is known."""
    counts, count = [], 0
    for bound in (*SECONDS, math.inf):
        count = buckets.get(bound, count)
        counts.append(count)
    assert quantile(share, counts) == (wanted and pytest.approx(wanted, abs=1e-6))


async def test_ten_who_look_cost_one_look(application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever models; after a while there is another one."""
    monkeypatch.setattr("deployments.status.look.LOOK_SECONDS", 1000.0)
    first = await asyncio.gather(*(application.told() for _ in range(10)))
    await application.http.post("/embeddings", json={"model": "a", "input": "x"})
    assert await application.told() == first[0]
    assert application.looks == 1


# --- on the command line -----------------------------------------------------------------------------


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[httpx.Response | BaseException]]:
    """What the cluster answers to the command, one after the other; what the last was asked stands first."""
    answers: list[httpx.Response | BaseException] = []
    asked.clear()

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, BaseException):
            raise found
        return found

    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **kw: real(transport=httpx.MockTransport(handle), **kw))
    monkeypatch.setattr(command, "WATCH_SECONDS", 0.0)
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    yield answers


asked: list[httpx.Request] = []
Answer = list[httpx.Response | BaseException]


async def test_the_table_shows_what_the_route_tells(
    application: Application, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each model, and 0 where all is well."""
    metrics = application.serving.metrics
    metrics.capacity.labels("a").set_function(lambda: 5000.0)
    await application.http.post("/embeddings", json={"model": "a", "input": ["x", "yy"]})
    await application.http.post("/embeddings", json={"model": "a", "input": "x" * 513})
    application.replicas = {"a": Replicas({"RUNNING": 2, "STARTING": 1})}
    answer.append(httpx.Response(200, json=await application.told()))
    assert main(["status", "http://cluster/v1/"]) == 0
    heading, first, *others = capsys.readouterr().out.splitlines()
    cells = [re.split(" {2,}", line) for line in (heading, first)]
    shown = dict(zip(*cells, strict=True))
    assert list(shown) == list(command.HEADINGS)
    assert (shown["MODEL"], shown["ENGINE"], shown["VERSION"]) == ("a", "fake", "1")
    assert shown["REPLICAS"] == "1 starting, 2 running"
    assert (shown["TOKENS/S"], shown["OF"], shown["WAITING"], shown["REQUESTS"]) == ("0", "5,000", "0", "1")
    assert shown["ERRORS"] == "1 context_length_exceeded"
    assert shown["P99"].endswith(" ms")
    assert [line.split()[0] for line in others] == NAMES[1:]
    assert str(asked[0].url) == "http://cluster/v1/status"
    assert "authorization" not in asked[0].headers


async def test_what_isnt_well_stands_on_top(
    application: Application,
    handles: dict[str, LocalHandle],
    answer: Answer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what to do, and 1; what a terminal would take for a command is only text."""
    handles["b"].failures = [EngineDeadError("gone")] * 100
    application.replicas = {"b": Replicas({}, "a folder named \x1b[2J\n")}
    answer.append(httpx.Response(200, json=await application.told()))
    assert main(["status"]) == 1
    first, second, _, heading, *_ = capsys.readouterr().out.splitlines()
    assert first == "b: can't start: a folder named �[2J�"
    assert second == f"    {DO['failed']}"
    assert heading.startswith("MODEL")
    assert str(asked[0].url) == "http://127.0.0.1:8000/status"


ENVELOPE = {"error": {"message": "this key isn't valid"}}
NOT_OURS = "http://x: answers with 200: no embedding cluster, or an older one\n"


@pytest.mark.parametrize(
    ("answered", "told"),
    [
        (httpx.ConnectError("Connection refused"), "http://x: Connection refused\n"),
        (httpx.Response(401, json=ENVELOPE), "http://x: 401: this key isn't valid\n"),
        (httpx.Response(200, text="<html>"), NOT_OURS),
        (httpx.Response(200, json=[]), NOT_OURS),
        (httpx.Response(200, json={"object": "list"}), NOT_OURS),
    ],
)
def test_a_cluster_that_cant_be_asked_is_told(
    answer: Answer, answered: httpx.Response | BaseException, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and 2."""
    answer.append(answered)
    assert main(["status", "http://x"]) == 2
    assert capsys.readouterr() == ("", told)


def test_the_key_comes_from_a_file_or_the_environment(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never from an argument, which others on the machine see."""
    answer.append(httpx.Response(401, json=ENVELOPE))
    file = tmp_path / "key"
    file.write_text("secret-file\n")
    monkeypatch.setenv(command.KEY_VARIABLE, "secret-environment")
    main(["status", "--key-file", str(file)])
    main(["status"])
    sent = [each.headers["authorization"] for each in asked]
    assert sent == ["Bearer secret-file", "Bearer secret-environment"]
    capsys.readouterr()
    assert main(["status", "--key-file", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/none: can't be read: No such file or directory\n"


def test_watching_goes_on_until_it_is_ended(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    """Through times in which nothing answers; the exit status is that of the last look."""
    well = {"object": "status", "ready": True, "problems": [], "models": []}
    answer += [httpx.ConnectError("refused"), httpx.Response(200, json=well), KeyboardInterrupt()]
    assert main(["status", "http://x", "--watch"]) == 0
    out, err = capsys.readouterr()
    assert err == "http://x: refused\n"
    assert out.split() == list(command.HEADINGS)
