"""What a job's texts go through in its own process, on engines behind local handles."""

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from deployments.bulk.connection import Connection, How
from deployments.bulk.patience import INTERNAL_ERRORS
from deployments.bulk.window import Window
from deployments.config.worker import Worker
from deployments.dispatch.dispatch import Dispatch
from deployments.engine.tokenizer import TextTokenizer, byte_tokenizer
from deployments.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EmbeddingError,
    EngineCrashError,
    EngineDeadError,
    EngineError,
    ModelUnavailableError,
)
from deployments.metrics import Metrics
from tests.app.conftest import LocalHandle, LocalMethod, expected


def connect(handle: LocalHandle, queue: Any = None, limits: Any = None) -> Connection:
    """Return a connection to the worker behind a handle, some keys of its tables changed."""
    worker: Worker = handle._plan.worker
    worker = worker.model_copy(
        update={
            "queue": worker.queue.model_copy(update=queue or {}),
            "limits": worker.limits.model_copy(update=limits or {}),
        }
    )
    return Connection(worker, Dispatch(worker, handle, Metrics()))  # type: ignore[arg-type]


async def embed(connection: Connection, texts: list[Any], name: str = "a", **how: Any) -> Any:
    """Embed as a client does."""
    return await connection.embed(texts, connection.catalog.find(name), How(**how), "caller")


async def test_a_requests_limits_are_none_of_a_jobs(handles: dict[str, LocalHandle]) -> None:
    """`b` takes 3 inputs and 100 tokens over HTTP."""
    texts = [f"text {number}" for number in range(200)]
    attempt = await embed(connect(handles["b"]), texts, "b")
    assert np.array_equal(attempt.vectors, expected(texts))
    assert attempt.tokens == sum(map(len, texts))


async def test_many_long_texts_are_cut_into_chunks(handles: dict[str, LocalHandle]) -> None:
    """More than a chunk and a window hold, some of them too long: the rest is in order."""
    texts = [f"{number} " + "x" * (number % 530) for number in range(2000)]
    attempt = await embed(connect(handles["a"]), texts)
    good = [text for text in texts if len(text) <= 512]
    assert np.array_equal(attempt.vectors, expected(good))
    assert [texts[row] for row in attempt.errors] == [text for text in texts if len(text) > 512]
    assert {type(error) for error in attempt.errors.values()} == {ContextLengthError}


async def test_a_dry_run_finds_what_a_run_would(handles: dict[str, LocalHandle]) -> None:
    """By the model's own tokens, and embeds nothing."""
    texts = ["a", None, "b" * 513, "", "c", *(f"{number} " + "x" * number for number in range(900))]
    wet = await embed(connect(handles["a"]), texts)
    asked = []

    class Watched(LocalHandle):
        """Keeps the names of what is called."""

        def __getattr__(self, name: str) -> Any:
            method = super().__getattr__(name)

            async def call(*arguments: Any) -> Any:
                asked.append(name)
                return await method.remote(*arguments)

            return LocalMethod(call)

    dry = await embed(connect(Watched(handles["a"]._plan)), texts, dry_run=True)
    assert {row: (type(each), each.message) for row, each in dry.errors.items()} == {
        row: (type(each), each.message) for row, each in wet.errors.items()
    }
    assert dry.tokens == wet.tokens
    assert set(asked) == {"describe"}


async def test_a_full_queue_is_waited_for(handles: dict[str, LocalHandle]) -> None:
    """A hundred callers where there is room for five."""
    connection = connect(handles["a"], limits={"max_outstanding_tokens": 40})
    texts = [f"text {number:03}" for number in range(100)]
    attempts = await asyncio.gather(*(embed(connection, [text]) for text in texts))
    assert np.array_equal(np.concatenate([each.vectors for each in attempts]), expected(texts))


async def test_a_model_that_is_away_is_waited_for(handles: dict[str, LocalHandle]) -> None:
    """For as long as the caller has patience, and no longer."""
    connection = connect(handles["a"], queue={"http_request_retries": 0})
    await embed(connection, ["x"])
    handles["a"].failures = [EngineDeadError("gone")] * 2
    attempt = await embed(connection, ["y"])
    assert np.array_equal(attempt.vectors, expected(["y"]))
    handles["a"].failures = [EngineDeadError("gone")] * 50
    with pytest.raises((ModelUnavailableError, DeadlineExceededError)):
        await embed(connection, ["z"], timeout_s=0.3)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineError, "the engine can't"),
        (
            EngineCrashError,
            "two replicas ended while they embedded this request; it isn't tried again",
        ),
    ],
)
async def test_one_text_that_the_engine_fails_on_is_found(
    handles: dict[str, LocalHandle], error: type[EngineError], message: str
) -> None:
    """The others are embedded; one that ends engines costs four of them, however many texts came with it."""
    failed = []
    ((bad,),) = TextTokenizer(byte_tokenizer()).encode(["!"])

    class Picky(LocalHandle):
        """Fails on calls with the token of `!`."""

        def __getattr__(self, name: str) -> Any:
            method = super().__getattr__(name)
            whole = method.remote

            async def call(batch: Any, *more: Any) -> Any:
                if name == "embed" and bad in batch.ids:
                    failed.append(batch)
                    raise error("the engine can't")
                return await whole(batch, *more)

            method.remote = call
            return method

    picky = connect(Picky(handles["a"]._plan))
    texts = [f"text {number}{'!' if number in (3, 77) else ''}" for number in range(100)]
    attempt = await embed(picky, texts)
    assert {row: error.message for row, error in attempt.errors.items()} == dict.fromkeys((3, 77), message)
    if error is EngineCrashError:
        assert len(failed) <= 4 + 2  # two of the chunk, and two of each text
    assert np.array_equal(attempt.vectors, expected([text for text in texts if "!" not in text]))


async def test_an_error_in_rays_clothes_is_the_texts_own(handles: dict[str, LocalHandle]) -> None:
    """From a replica on another node it comes as an instance of a class that Ray derives from ours."""
    handle = handles["a"]
    connection = connect(handle)
    await embed(connection, ["x"])
    for error in (EngineError("it can't", "input", 2.0), EmbeddingError("internal error")):
        # As often as an engine's error is tried again; what else may pass, passes after the first.
        times = INTERNAL_ERRORS if type(error) is EngineError else 1
        handle.failures = [RayTaskError("embed", "a traceback", error).as_instanceof_cause()] * times
        attempt = await embed(connection, ["y"])
        if type(error) is EngineError:
            (got,) = attempt.errors.values()
            assert (type(got), str(got), got.param, got.retry_after) == (
                EngineError,
                "it can't",
                "input",
                2.0,
            )
        else:
            assert np.array_equal(attempt.vectors, expected(["y"]))  # what may pass is tried again
    handle.failures = [
        RayTaskError("describe", "a traceback", ModelUnavailableError("m")).as_instanceof_cause()
    ]
    with pytest.raises(ModelUnavailableError) as caught:
        await connect(handle).dispatch.model(asyncio.get_running_loop().time() + 10)
    assert type(caught.value) is ModelUnavailableError


async def test_a_window_lets_in_by_turn() -> None:
    """What is too large for it goes in alone; who gives up makes room for those behind."""
    window, inside = Window(lambda: 10), []
    leave = {name: asyncio.Event() for name in "abcd"}

    async def work(name: str, tokens: int) -> None:
        async with window.room(tokens):
            inside.append(name)
            await leave[name].wait()

    tasks = {}
    for name, tokens in (("a", 6), ("b", 25), ("c", 2), ("d", 4)):
        tasks[name] = asyncio.create_task(work(name, tokens))
        await asyncio.sleep(0)
    assert inside == ["a"]  # `c` has room, and is behind `b`
    leave["a"].set()
    await tasks["a"]
    await asyncio.sleep(0)
    assert inside == ["a", "b"]
    tasks["c"].cancel()
    await asyncio.wait({tasks["c"]})
    leave["b"].set()
    await tasks["b"]
    await asyncio.sleep(0)
    assert inside == ["a", "b", "d"]
    leave["d"].set()
    await tasks["d"]
