"""What goes into a step: people first, bulk work in what is left, and short where somebody waits."""

import asyncio
from typing import Any

import numpy as np
import pytest

from deployments.config.worker import FakeEngineArgs
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine, fake_vectors
from deployments.engine.steps import EXPECTING_SECONDS, Step, StepQueue, StepTimes
from deployments.errors import EngineCrashError, EngineDeadError, EngineError
from tests.harness import checkpoints

FIXED, EACH = 0.003, 0.0001  # 30 tokens cost as much as any step does
BULK = TokenBatch.of([[n % 256, n // 256, *[7] * 18] for n in range(400)])
ONE = TokenBatch.of([[1, 2, 3]])
MAX_TOKENS = 2000


class Steps:
    """A queue with a clock, and an engine whose steps take what the line says."""

    def __init__(self, measured: bool = True) -> None:
        """Have measured two sizes."""
        self.now = 100.0
        self.queue = StepQueue(MAX_TOKENS, lambda: self.now)
        self.taken: list[Step] = []
        for tokens in (1, 1000) if measured else ():
            self.queue.times.record(tokens, FIXED + EACH * tokens)

    def step(self) -> Step | None:
        """Compute the next step."""
        if (step := self.queue.take()) is not None:
            self.taken.append(step)
            seconds = FIXED + EACH * step.batch.tokens
            self.now += seconds
            self.queue.done(step, fake_vectors(step.batch, 8), seconds)
        return step

    def all_tokens(self) -> list[int]:
        """Compute what there is; return the tokens of each step."""
        first = len(self.taken)
        while self.step() is not None:
            pass
        return [step.batch.tokens for step in self.taken[first:]]


@pytest.fixture
async def steps() -> Steps:
    """One that has measured its line."""
    return Steps()


async def test_bulk_work_by_itself_has_steps_whose_fixed_cost_doesnt_count(steps: Steps) -> None:
    """Some thirty times as many tokens as the fixed cost would compute, whatever calls they are of."""
    rows = [steps.queue.put(BULK, bulk=True) for _ in range(3)]
    tokens = steps.all_tokens()
    assert sum(tokens) == 3 * BULK.tokens
    assert min(tokens[:-1]) >= 940
    assert max(tokens) <= 970
    for each in rows:
        assert np.array_equal(await each, fake_vectors(BULK, 8))


async def test_people_go_first_and_bulk_work_fills_what_is_left(steps: Steps) -> None:
    """Past all the bulk calls; with as much bulk work as leaves the step half as long again as its share."""
    bulk = steps.queue.put(BULK, bulk=True)
    steps.step()
    person = steps.queue.put(ONE)
    step = steps.step()
    assert step is not None
    assert [(call.bulk, count) for call, _, count in step.pieces] == [(False, 1), (True, 1)]
    assert np.array_equal(await person, fake_vectors(ONE, 8))
    assert not bulk.done()


async def test_steps_are_short_for_a_while_after_somebody_came(steps: Steps) -> None:
    """Who comes next waits for the step that they meet; four fifths of its time is bulk work all the same."""
    steps.queue.put(ONE)
    steps.step()
    steps.queue.put(BULK, bulk=True)
    for _ in range(5):
        step = steps.step()
        assert step is not None
        assert 100 <= step.batch.tokens <= 120
    steps.now += EXPECTING_SECONDS
    step = steps.step()
    assert step is not None
    assert step.batch.tokens >= 940


async def test_bulk_work_gets_on_however_many_come(steps: Steps) -> None:
    """One input in every second step at least."""
    bulk = steps.queue.put(BULK, bulk=True)
    for _ in range(2 * len(BULK)):
        for _ in range(20):
            steps.queue.put(TokenBatch.of([[5] * 20]))
        steps.step()
    await asyncio.sleep(0)
    assert bulk.done()


async def test_bulk_work_too_long_to_share_a_step_goes_between_people(steps: Steps) -> None:
    """Who is in a step waits for no text of hundreds of tokens, but in every second one."""
    steps.queue.put(TokenBatch.of([[7] * 500] * 3), bulk=True)
    tokens = []
    for _ in range(4):
        steps.queue.put(ONE)
        step = steps.step()
        assert step is not None
        tokens.append(step.batch.tokens)
    assert tokens == [3, 503, 3, 503]


async def test_one_that_is_alone_shares_its_step_with_nobody(steps: Steps) -> None:
    """Who came before leaves first; bulk or not, it gets its turn though people come all the time."""
    before = [steps.queue.put(ONE), steps.queue.put(BULK, bulk=True)]
    suspects = [steps.queue.put(TokenBatch.of([[9]]), bulk, alone=True) for bulk in (False, True)]
    steps.queue.put(ONE)
    assert steps.all_tokens()[1:3] == [1, 1]
    for step in steps.taken:
        assert len(step.pieces) == 1 or not any(call.alone for call, _, _ in step.pieces)
    await asyncio.gather(*before, *suspects)


async def test_bulk_work_by_token_lets_people_go_first(steps: Steps) -> None:
    """And gets every second step while they come."""
    calls = [steps.queue.put(BULK, bulk=True, by_token=True) for _ in range(3)]
    person = steps.queue.put(ONE)
    step = steps.step()
    assert step is not None
    assert not step.by_token
    person = steps.queue.put(ONE)
    assert [step.by_token for step in (steps.step(), steps.step()) if step] == [True, False]
    steps.all_tokens()
    await asyncio.gather(person, *calls)


async def test_who_is_cancelled_leaves_before_its_step(steps: Steps) -> None:
    """Of a call that has begun the rest."""
    bulk, person = steps.queue.put(BULK, bulk=True), steps.queue.put(ONE)
    steps.step()
    bulk.cancel()
    person.cancel()
    assert steps.step() is None


async def test_a_row_that_isnt_finite_is_tried_once_more_alone(steps: Steps) -> None:
    """It may be another input's doing; the second time it is its own."""
    batch = TokenBatch.of([[1], [2], [3]])
    rows = steps.queue.put(batch)
    step = steps.queue.take()
    assert step is not None
    spoilt = fake_vectors(batch, 8)
    spoilt[1:] = np.nan
    assert steps.queue.done(step, spoilt, 0.01) == (False, [])
    again = steps.queue.take()
    assert again is not None
    assert again.batch.ids.tolist() == [2]
    assert steps.queue.done(again, fake_vectors(again.batch, 8), 0.01)[0]
    again = steps.queue.take()
    assert again is not None
    finite, ended = steps.queue.done(again, np.full((1, 8), np.nan, np.float32), 0.01)
    assert not finite
    assert len(ended) == 1
    got = await rows
    assert np.array_equal(got[:2], fake_vectors(batch, 8)[:2])
    assert np.isnan(got[2]).all()


async def test_an_input_longer_than_a_step_goes_by_itself() -> None:
    """As does the first one, of which nothing is known."""
    steps = Steps(measured=False)
    steps.queue.put(TokenBatch.of([[1] * 3 * MAX_TOKENS, [2]]))
    assert steps.all_tokens() == [3 * MAX_TOKENS, 1]


async def test_an_engine_that_ends_fails_everybody_by_their_part_in_it() -> None:
    """Those in its step as perhaps guilty, those in line as not, and who comes later."""
    engine = FakeEngine(FakeEngineArgs(call_seconds=0.01, fatal_token=9))
    fatal, waiting = (
        asyncio.ensure_future(engine.embed(TokenBatch.of([[token]]), alone=True)) for token in (9, 1)
    )
    errors: list[Any] = await asyncio.gather(fatal, waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [EngineCrashError, EngineDeadError]
    with pytest.raises(EngineDeadError):
        await engine.embed(ONE)


async def test_a_step_that_fails_fails_its_calls_alone() -> None:
    """The next one is computed."""
    engine = FakeEngine(FakeEngineArgs(error_token=9))
    with pytest.raises(EngineError):
        await engine.embed(TokenBatch.of([[9]]))
    assert np.array_equal(await engine.embed(ONE), fake_vectors(ONE, 64))


def test_the_line_is_that_of_the_engine_whatever_sizes_came() -> None:
    """One step that hung doesn't move it."""
    times = StepTimes()
    assert times.speed(1000) == 0.0
    for number in range(200):
        tokens = (3, 20, 90, 700)[number % 4] + number % 7
        times.record(tokens, FIXED + EACH * tokens + (1.0 if number == 70 else 0.0))
    assert times.fixed == pytest.approx(FIXED, rel=0.05)
    assert times.each == pytest.approx(EACH, rel=0.05)
    assert times.tokens(0.8) == pytest.approx(120, rel=0.1)
    assert times.speed(1000) == pytest.approx(1000 / (FIXED + 1000 * EACH), rel=0.05)


def test_of_steps_of_one_size_the_speed_is_known_and_the_fixed_cost_is_taken_to_be_half() -> None:
    """As long as bulk work alone was there."""
    times = StepTimes()
    for _ in range(40):
        times.record(1000, 0.1)
    assert times.speed(1000) == pytest.approx(10_000)
    assert times.tokens(0.8) == pytest.approx(4000)


def test_a_slice_of_a_batch_is_the_batch_of_the_slice() -> None:
    """Also an empty one."""
    batch = TokenBatch.of([[1, 2], [3], [4, 5, 6]])
    assert [ids.tolist() for ids in batch[1:]] == [[3], [4, 5, 6]]
    assert [ids.tolist() for ids in batch[0:2]] == [[1, 2], [3]]
    assert len(batch[3:]) == batch[3:].tokens == 0


# What `engine/packed.py` uses of vLLM beyond its documented interface, by the file that has it.
PRIVATE = {
    "v1/worker/utils.py": (
        "class AttentionGroup",
        "layer_names:",
        "kernel_block_size:",
        "def build_metadata(",
    ),
    "v1/worker/gpu_model_runner.py": (
        "self.attn_groups",
        "self.kv_caches",
        "self.kv_cache_config",
        "self.vllm_config",
    ),
    "v1/worker/gpu/model_runner.py": ("self.attn_groups", "self.kv_caches", "self.model_state"),
    "v1/worker/gpu/model_states/encoder_only.py": ("self.encoder_attn_groups",),
    "config/model.py": ("def uses_mrope(",),
    "v1/worker/cpu_model_runner.py": ("class CPUModelRunner(GPUModelRunner)", "self.model ="),
    "v1/worker/worker_base.py": ("worker_extension_cls", "self.model_runner"),
    "v1/kv_cache_interface.py": (
        "class EncoderOnlyAttentionSpec",
        "class FullAttentionSpec",
        "class SlidingWindowSpec",
        "class MLAAttentionSpec",
        "class UniformTypeKVCacheSpecs",
        "kv_cache_specs:",
        "num_blocks:",
    ),
    "v1/attention/backend.py": (
        "class CommonAttentionMetadata",
        "query_start_loc_cpu:",
        "seq_lens_cpu_upper_bound:",
        "block_table_tensor:",
        "slot_mapping:",
        "positions:",
    ),
    "v1/pool/metadata.py": ("class PoolingStates", "class PoolingCursor", "finished_mask:"),
    "forward_context.py": ("def set_forward_context(", "cudagraph_runtime_mode:", "slot_mapping:"),
    "config/compilation.py": ("static_forward_context:",),
    "model_executor/layers/pooler/special.py": ("poolers_by_task",),
    "model_executor/layers/pooler/abstract.py": ("def get_pooling_updates(",),
    "model_executor/layers/attention_layer_base.py": ("class AttentionLayerBase",),
    "v1/metrics/loggers.py": (
        "counter_prompt_tokens",
        "counter_request_success",
        "histogram_iteration_tokens",
        "gauge_scheduler_running",
        "gauge_scheduler_waiting",
        "histogram_queue_time_request",
        "histogram_inference_time_request",
        "histogram_e2e_time_request",
    ),
}


@pytest.mark.parametrize("file", PRIVATE)
def test_what_packed_steps_use_of_vllm_is_where_it_was(file: str) -> None:
    """Whoever comes to a new release sees here what has moved."""
    text = (checkpoints.package_folder("vllm", "") / file).read_text()
    assert [name for name in PRIVATE[file] if name not in text] == []
