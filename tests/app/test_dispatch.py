"""Joining, splitting, sharing, lanes, retries and admission, over engines with a set service time."""

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.config.load import load_workers
from deployments.dispatch.dispatch import Dispatch
from deployments.dispatch.prepare import Prepared
from deployments.dispatch.work import Input, Lane, Pending, split
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.errors import (
    DeadlineExceededError,
    EngineCrashError,
    EngineDeadError,
    EngineError,
    FatalInputError,
    ModelUnavailableError,
    NonFiniteEmbeddingError,
    QueueFullError,
)
from deployments.metrics import Metrics
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.app.conftest import LocalHandle
from tests.harness import workers

Make = Callable[..., Dispatch]


class RecordingHandle(LocalHandle):
    """Keeps the batches of all calls that were made, cancelled or not."""

    def __init__(self, plan: Any) -> None:
        """Start with none."""
        super().__init__(plan)
        self.batches: list[TokenBatch] = []
        self.cancelled = 0
        self.poison: set[int] = set()
        self.fatal: set[int] = set()
        self._death = asyncio.Event()  # of the engine that there is now

    def __getattr__(self, name: str) -> Any:
        """Record what `embed` is called with."""
        method = super().__getattr__(name)
        inner = method.remote

        async def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "embed":
                self.batches.append(arguments[0])
                if self.poison & set(arguments[0].ids.tolist()):
                    raise NonFiniteEmbeddingError("not finite")
                if self.fatal:
                    return await self._until_death(inner(*arguments), arguments[0])
            try:
                return await inner(*arguments, **keywords)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        method.remote = call
        return method

    async def _until_death(self, answer: Any, batch: TokenBatch) -> Any:
        """Answer, unless one of the calls under way is fatal: then all of them meet the engine's end."""
        death = self._death
        ended = asyncio.ensure_future(death.wait())
        answering = asyncio.ensure_future(answer)
        await asyncio.wait({ended, answering}, return_when=asyncio.FIRST_COMPLETED)
        if self.fatal & set(batch.ids.tolist()) and not death.is_set():
            self._death = asyncio.Event()  # the next engine's
            death.set()
        ended.cancel()
        if death.is_set():
            answering.cancel()
            raise EngineCrashError("the engine has ended")
        return await answering


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a dispatch to one fake replica."""

    def make(engine_args: str = "", more: str = "", retries: int = 7) -> Dispatch:
        text = workers.fake("m", engine_args, more)
        file = tmp_path / "m.toml"
        file.write_text(text.replace("[queue]", f"[queue]\nhttp_request_retries = {retries}"))
        (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
        return Dispatch(plan.worker, RecordingHandle(plan), Metrics())  # type: ignore[arg-type]

    return make


def handle_of(dispatch: Dispatch) -> RecordingHandle:
    """Return the handle behind a dispatch."""
    handle = dispatch._calls._handle
    assert isinstance(handle, RecordingHandle)
    return handle


def soon(seconds: float = 30.0) -> float:
    """Return a deadline."""
    return asyncio.get_running_loop().time() + seconds


def inputs(count: int, length: int = 3, start: int = 0) -> TokenBatch:
    """Return `count` inputs that differ from each other."""
    numbers = range(start, start + count)
    return TokenBatch.of([[n % 256, n // 256 % 256, *[7] * (length - 2)] for n in numbers])


async def check(dispatch: Dispatch, batch: TokenBatch, **options: Any) -> None:
    """Embed and compare with what is right."""
    vectors = await dispatch.embed(batch, soon(), **options)
    assert np.array_equal(vectors, fake_vectors(batch, 64))


async def test_the_cache_gives_what_it_was_given(make: Make) -> None:
    """Each text is embedded once; another version of the model isn't helped by it."""
    dispatch = make(more="[limits]\ncache_mib = 1")
    for _ in range(3):
        await check(dispatch, inputs(100))
    assert sum(map(len, handle_of(dispatch).batches)) == 100
    assert 'cache_hits_total{worker="m"} 200.0' in dispatch._metrics.text().decode()
    await check(dispatch, inputs(150))
    assert sum(map(len, handle_of(dispatch).batches)) == 150
    card, _ = await dispatch.model(soon())
    await check(dispatch, inputs(150), version=card.version)
    assert sum(map(len, handle_of(dispatch).batches)) == 300


async def test_the_cache_is_bounded(make: Make) -> None:
    """The least recently used go first; a new size takes effect at once."""
    dispatch = make(more="[limits]\ncache_mib = 1")
    await check(dispatch, inputs(3000))
    assert dispatch._cache is not None
    assert 2**20 - 2000 < dispatch._cache.size <= 2**20
    await check(dispatch, inputs(100, start=2900))
    assert sum(map(len, handle_of(dispatch).batches)) == 3000
    limits = dispatch.worker.limits.model_copy(update={"cache_mib": 0})
    dispatch.worker = dispatch.worker.model_copy(update={"limits": limits})
    await check(dispatch, inputs(100, start=2900))
    assert sum(map(len, handle_of(dispatch).batches)) == 3100


async def test_what_waits_is_joined(make: Make) -> None:
    """256 single inputs at once need at most a eighth as many calls, and each gets its own vector."""
    dispatch = make("call_seconds = 0.01")
    await dispatch.model(soon())
    await asyncio.gather(*(check(dispatch, inputs(1, start=n)) for n in range(256)))
    handle = handle_of(dispatch)
    assert sum(map(len, handle.batches)) == 256
    assert len(handle.batches) <= 256 / 8


async def test_a_lone_request_leaves_at_once(make: Make) -> None:
    """No timer: the call has begun before anything else happens."""
    dispatch = make()
    await dispatch.model(soon())
    task = asyncio.ensure_future(check(dispatch, inputs(1)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(handle_of(dispatch).batches) == 1
    await task


async def test_identical_inputs_are_embedded_once(make: Make) -> None:
    """Within a request, and across requests that wait or fly."""
    dispatch = make("call_seconds = 0.02")
    await dispatch.model(soon())
    same = TokenBatch.of([[1, 2], [3], [1, 2], [1, 2]])
    await asyncio.gather(*(check(dispatch, same) for _ in range(50)))
    assert sum(map(len, handle_of(dispatch).batches)) == 2
    await check(dispatch, same)  # and nothing is kept
    assert sum(map(len, handle_of(dispatch).batches)) == 4


async def test_a_big_request_is_split_and_comes_back_in_order(make: Make) -> None:
    """Mixed lengths; parts of nearly equal tokens."""
    dispatch = make()
    lengths = np.random.default_rng(0).integers(2, 200, 2048)
    batch = TokenBatch.of([[n % 256, n // 256, *[9] * int(length)] for n, length in enumerate(lengths)])
    await check(dispatch, batch)
    tokens = [part.tokens for part in handle_of(dispatch).batches]
    assert len(tokens) > 10
    assert sum(tokens) == batch.tokens


def test_parts_for_four_replicas_differ_by_less_than_a_tenth() -> None:
    """And their number is a multiple of four."""
    rng = np.random.default_rng(1)
    job = Pending(2048, None)  # type: ignore[arg-type]
    waiting = [
        Input(b"", np.zeros(int(length), np.int32), Lane.BULK, [(job, 0)])
        for length in rng.lognormal(3.5, 1, 2048).clip(2, 2000)
    ]
    parts = split(waiting, 4096, 4)
    tokens = [sum(len(each.ids) for each in part) for part in parts]
    assert len(parts) % 4 == 0
    assert [each for part in parts for each in part] == waiting
    shares = [sum(tokens[number::4]) for number in range(4)]
    assert max(shares) / min(shares) < 1.1


async def test_interactive_work_passes_bulk_work(make: Make) -> None:
    """A short request is through long before the bulk that came first."""
    dispatch = make("token_seconds = 0.00005")
    await dispatch.model(soon())
    bulk = asyncio.ensure_future(check(dispatch, inputs(2000, length=10), lane=Lane.BULK))
    await asyncio.sleep(0)
    await check(dispatch, inputs(1, start=5000))
    assert not bulk.done()
    await bulk


async def test_callers_take_turns(make: Make) -> None:
    """One with a single request isn't put behind all of one with a hundred."""
    dispatch = make("token_seconds = 0.00002")
    await dispatch.model(soon())
    order: list[str] = []

    async def ask(caller: str, number: int) -> None:
        await check(dispatch, inputs(10, length=100, start=number * 10), caller=caller)
        order.append(caller)

    flood = [asyncio.ensure_future(ask("flood", number)) for number in range(60)]
    await asyncio.sleep(0)
    await ask("other", 1000)
    assert order.index("other") < 25
    await asyncio.gather(*flood)


async def test_a_client_that_leaves_frees_its_work(make: Make) -> None:
    """Its waiting parts are never sent, and the call in flight is cancelled."""
    dispatch = make("call_seconds = 0.2")
    await dispatch.model(soon())
    task = asyncio.ensure_future(dispatch.embed(inputs(2000, length=20), soon()))
    for _ in range(3):
        await asyncio.sleep(0)
    assert handle_of(dispatch).batches
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    sent = len(handle_of(dispatch).batches)
    await check(dispatch, inputs(1, start=9000))
    assert handle_of(dispatch).cancelled == sent
    assert len(handle_of(dispatch).batches) == sent + 1
    assert dispatch._outstanding.tokens == 0
    assert not dispatch._inputs


async def test_one_who_shares_an_input_keeps_it_when_the_other_leaves(make: Make) -> None:
    """Cancelling one request must not fail another."""
    dispatch = make("call_seconds = 0.05")
    await dispatch.model(soon())
    first = asyncio.ensure_future(dispatch.embed(inputs(1), soon()))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(check(dispatch, inputs(1)))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert len(handle_of(dispatch).batches) == 1


async def test_a_deadline_ends_the_wait(make: Make) -> None:
    """With 408's error, and nothing is left behind."""
    dispatch = make("call_seconds = 5.0")
    with pytest.raises(DeadlineExceededError):
        await dispatch.embed(inputs(3), soon(0.05))
    assert not dispatch._inputs


async def test_retries_are_bounded(make: Make) -> None:
    """`http_request_retries` more calls, then 503's error with a Retry-After."""
    dispatch = make(retries=2)
    await dispatch.model(soon())
    handle_of(dispatch).failures = [EngineDeadError("it has ended before") for _ in range(10)]
    with pytest.raises(ModelUnavailableError) as caught:
        await dispatch.embed(inputs(1), soon())
    assert caught.value.retry_after
    assert len(handle_of(dispatch).batches) == 3
    assert b'embedding_retries_total{worker="m"} 2.0' in dispatch._metrics.text()


async def test_a_poisonous_input_fails_alone(make: Make) -> None:
    """What was joined with it is embedded all the same, in the same call: 59 of 60 strangers are served."""
    dispatch = make("call_seconds = 0.01, nan_token = 30")
    await dispatch.model(soon())
    tasks = [asyncio.ensure_future(check(dispatch, inputs(1, start=n))) for n in range(60)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results if result is not None] == [NonFiniteEmbeddingError]
    assert isinstance(results[30], NonFiniteEmbeddingError)
    assert sum(map(len, handle_of(dispatch).batches)) == 60


async def test_inputs_that_end_engines_are_tried_twice_each(make: Make) -> None:
    """The second time without the strangers that died with them, all of whom are served: people or bulk."""
    dispatch = make("call_seconds = 0.005")
    await dispatch.model(soon())
    handle = handle_of(dispatch)
    handle.fatal = {20, 40}
    tasks = [
        asyncio.ensure_future(check(dispatch, inputs(1, start=n), lane=Lane(n // 2 % 2))) for n in range(60)
    ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {n: type(each) for n, each in enumerate(results) if each is not None} == {
        20: FatalInputError,
        40: FatalInputError,
    }
    for fatal in handle.fatal:
        tries = [len(batch) for batch in handle.batches if fatal in batch.ids]
        assert len(tries) == 2
        assert tries[1] == 1
    await check(dispatch, inputs(60, start=100))
    await asyncio.sleep(0)
    assert not any(dispatch._calls._flying.values())


async def test_chance_doesnt_fail_a_call_that_met_no_death(make: Make) -> None:
    """An engine that had ended before, a replica that Serve doesn't find: neither is the call's doing."""
    dispatch = make()
    await dispatch.model(soon())
    handle_of(dispatch).failures = [
        EngineDeadError("ended"),
        DeploymentUnavailableError(DeploymentID("m")),
        ActorDiedError(),
    ]
    await check(dispatch, inputs(3))


async def test_an_engine_error_reaches_the_client_as_such(make: Make) -> None:
    """Not as a retry: the same call would fail again."""
    dispatch = make()
    await dispatch.model(soon())
    handle_of(dispatch).failures = [EngineError("refused")]
    with pytest.raises(EngineError, match="refused"):
        await dispatch.embed(inputs(1), soon())


async def test_a_full_queue_refuses_at_once(make: Make) -> None:
    """Told from the measured rate when to come back; what was let in is served."""
    dispatch = make("token_seconds = 0.001", "[limits]\nmax_outstanding_tokens = 500")
    await dispatch.model(soon())
    for _ in range(5):
        await asyncio.gather(*(check(dispatch, inputs(2, 40, start=n * 2)) for n in range(6)))
    rate = dispatch._calls.rate
    assert rate is not None
    assert 200 < rate < 1300  # a token takes the engine a millisecond, and a slow machine takes longer
    admitted = [asyncio.ensure_future(check(dispatch, inputs(1, 40, start=n))) for n in range(12)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError) as caught:
        await dispatch.embed(inputs(1, 40, start=99), soon())
    # 480 tokens, of which a quick machine embeds 1,000 a second: rounded up to the least wait.
    assert caught.value.retry_after == max(1.0, 480 / rate)
    await asyncio.gather(*admitted)
    await check(dispatch, inputs(1))


async def test_a_full_queue_costs_nothing(make: Make) -> None:
    """Neither tokenising where nothing more is let in, nor a key's tokens where this isn't."""
    dispatch = make("token_seconds = 0.001", "[limits]\nmax_outstanding_tokens = 100")
    await dispatch.model(soon())
    prepared: list[int] = []
    charged: list[int] = []

    async def charge(tokens: int) -> None:
        charged.append(tokens)

    async def ask(length: int, caller: str = "") -> None:
        async def prepare(*_: Any) -> Prepared:
            prepared.append(length)
            return Prepared(inputs(1, length, start=len(prepared)))

        await dispatch.embed_by(prepare, soon(), caller=caller, charge=charge)

    first = [asyncio.ensure_future(ask(44, "first")), asyncio.ensure_future(ask(44, "second"))]
    while len(charged) < 2:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await ask(13, "third")
    assert (prepared, charged) == ([44, 44, 13], [44, 44])
    first.append(asyncio.ensure_future(ask(12, "third")))
    while len(charged) < 3:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await ask(1, "third")
    assert (prepared, charged) == ([44, 44, 13, 12], [44, 44, 12])
    await asyncio.gather(*first)


async def test_time_runs_out_while_tokens_are_made(make: Make) -> None:
    """The deadline is the whole request's."""
    dispatch = make()
    await dispatch.model(soon())

    async def prepare(*_: Any) -> Prepared:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(DeadlineExceededError):
        await dispatch.embed_by(prepare, soon(0.05))


async def test_a_full_queue_has_room_for_another_caller(make: Make) -> None:
    """However much one of them sends."""
    dispatch = make("token_seconds = 0.0005", "[limits]\nmax_outstanding_tokens = 2000")
    await dispatch.model(soon())
    batches = [inputs(1, 40, start=n) for n in range(200)]
    flood = [asyncio.ensure_future(dispatch.embed(batch, soon(), caller="flood")) for batch in batches]
    await asyncio.sleep(0)
    for number in range(5):
        await check(dispatch, inputs(1, 40, start=1000 + number), caller="other")
    results = await asyncio.gather(*flood, return_exceptions=True)
    refused = sum(isinstance(result, QueueFullError) for result in results)
    assert 150 < refused < 160  # eight ninths of 2,000 tokens are 44 requests
    assert not dispatch._admission._held


async def test_a_flood_of_small_requests_yields_to_another_caller(make: Make) -> None:
    """As one large request does; while there is nobody else, it doesn't count as bulk."""
    dispatch = make("token_seconds = 0.00002")
    await dispatch.model(soon())
    done: list[str] = []

    async def ask(caller: str, number: int) -> None:
        await check(dispatch, inputs(10, length=100, start=number * 10), caller=caller)
        done.append(caller)

    flood = [asyncio.ensure_future(ask("flood", number)) for number in range(40)]
    await asyncio.sleep(0)
    assert not dispatch._calls._flying[Lane.BULK]
    await ask("other", 1000)
    flood += [asyncio.ensure_future(ask("flood", number)) for number in range(40, 60)]
    await asyncio.sleep(0)
    assert dispatch._calls._flying[Lane.BULK]
    await asyncio.gather(*flood)


def of_requests() -> set[int]:
    """Return the identities of all jobs and inputs that there are."""
    return {id(each) for each in gc.get_objects() if isinstance(each, Pending | Input)}


async def test_an_answered_request_leaves_no_cycle(make: Make) -> None:
    """Its vectors are freed at once, not at the next full collection."""
    dispatch = make()
    await check(dispatch, inputs(1))
    gc.collect()
    gc.disable()
    others = of_requests()  # an earlier test's, which a traceback may keep
    try:
        await asyncio.gather(*(check(dispatch, inputs(5, start=5 * n)) for n in range(100)))
        await asyncio.sleep(0)  # the calls' tasks end after those that they answered
        assert of_requests() <= others
    finally:
        gc.enable()


async def test_requests_that_fail_in_several_parts_leave_the_lane_open(make: Make) -> None:
    """A call that is cancelled before it began gives its place in flight back."""
    dispatch = make("call_seconds = 0.001")
    await dispatch.model(soon())
    handle_of(dispatch).poison = {255}
    for number in range(4):
        batch = inputs(600, length=20, start=number * 600)
        poisoned = TokenBatch.join([np.array([255], np.int32), *batch])
        with pytest.raises(NonFiniteEmbeddingError):
            await dispatch.embed(poisoned, soon())
    handle_of(dispatch).poison = set()
    await check(dispatch, inputs(600, length=20, start=9000), lane=Lane.BULK)
    await asyncio.sleep(0)
    assert not any(dispatch._calls._flying.values())


async def test_a_quiet_worker_isnt_taken_for_a_slow_one(make: Make) -> None:
    """Small requests don't measure what it could do, neither one after the other nor a few at a time."""
    dispatch = make("call_seconds = 0.02", "[limits]\nrequest_timeout_s = 5")
    for number in range(15):
        await check(dispatch, inputs(1, start=number))
    for number in range(15):
        await asyncio.gather(*(check(dispatch, inputs(1, start=20 + 4 * number + n)) for n in range(4)))
    assert dispatch._calls.rate is None
    await asyncio.gather(*(check(dispatch, inputs(1000, length=20, start=n * 1000)) for n in range(5)))


def test_no_part_has_more_inputs_than_a_call_may() -> None:
    """However short they are."""
    job = Pending(5000, None)  # type: ignore[arg-type]
    waiting = [Input(b"", np.zeros(2, np.int32), Lane.BULK, [(job, 0)]) for _ in range(5000)]
    assert max(map(len, split(waiting, 16_384, 1))) <= 1024
