"""Tensor and pipeline parallelism: real vLLM ranks inside one Serve replica's placement group."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import placement_group_table

from deployments.app import BuildArguments, build
from deployments.engine.batch import TokenBatch
from tests.harness import checkpoints, workers
from tests.harness.server import free_port, wait_for
from tests.model.conftest import cosines
from tests.model.test_two_models import token_ids

pytestmark = pytest.mark.model
TEXTS = ["What is the capital of China?", "Explain gravity", "a", "The quick brown fox jumps. " * 20]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray with Serve on a free port."""
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    yield
    serve.shutdown()
    ray.shutdown()


def embed(folder: Path, model: Path, tensor: int, pipeline: int) -> tuple[np.ndarray, list[Any], int]:
    """Serve one worker, embed, look at its group and its processes, and take it down again.

    On the way embed what gives NaN, of which nothing may stay on any rank.
    """
    handle = deploy(folder, model, tensor, pipeline)
    batch = TokenBatch.of([token_ids(text) for text in TEXTS])
    vectors = handle.embed.remote(batch).result(timeout_s=60).vectors
    if model.name != checkpoints.minilm().name:
        # Longer than what comes next, which would write over them else.
        bad = TokenBatch.of([[101, checkpoints.NAN_TOKEN, *[n] * 28, 102] for n in range(1000, 1008)])
        for _ in range(3):
            assert handle.embed.remote(bad).result(timeout_s=60).not_finite == tuple(range(8))
            after = handle.embed.remote(batch).result(timeout_s=60)
            assert after.not_finite == ()
            assert cosines(after.vectors, vectors).min() >= 0.999999
    served = handle.describe.remote().result(timeout_s=60).steps
    assert served.startswith("packed steps" if pipeline == 1 else "vLLM's scheduler")
    groups = live_groups()
    ranks = len(rank_processes())
    delete()
    return vectors, groups, ranks


def deploy(folder: Path, model: Path, tensor: int, pipeline: int) -> DeploymentHandle[Any]:
    """Serve one worker of so many ranks, a core for each."""
    # Pipeline stages are vLLM's scheduler's.
    steps = "packed" if pipeline == 1 else "auto"
    generator = (
        f'type = "vllm"\nmodel_path = "{model}"\ntensor_parallel_size = {tensor}\n'
        f'pipeline_parallel_size = {pipeline}\nmax_model_len = 256\nsteps = "{steps}"\n'
        # So few blocks that each is used again and again.
        'engine_args = {num_gpu_blocks_override = 20, dtype = "float32"}'
    )
    file = folder / "worker.toml"
    file.write_text(workers.worker("m", generator, "[deployment]\nnum_cpus = 1\nnum_gpus = 0"))
    serve.run(build(BuildArguments(config=str(file))), name="parallel", route_prefix="/parallel")
    return serve.get_deployment_handle("m", "parallel")


def delete() -> None:
    """Take the worker down, and wait until neither a rank nor a group is left."""
    serve.delete("parallel")
    wait_for(lambda: not rank_processes(), 60, "the ranks have ended")
    wait_for(lambda: not live_groups(), 60, "the placement group is gone")


def live_groups() -> list[Any]:
    """Return the placement groups that Ray shows, but for those removed."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def rank_processes() -> list[psutil.Process]:
    """Return vLLM's live rank processes."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        title = " ".join(process.info["cmdline"] or [])
        if "VLLM::Worker" in title and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def single(cluster: None, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Each model's vectors on one rank."""
    found = {}
    for name, model in (("qwen3", qwen3), ("minilm", checkpoints.minilm())):
        found[name], groups, ranks = embed(tmp_path_factory.mktemp("single"), model, 1, 1)
        assert [group["bundles"] for group in groups] == [{0: {"CPU": 1.0}}]
        assert ranks == 0  # one rank runs in the replica's own process
    return found


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline"), [("qwen3", 2, 1), ("qwen3", 1, 2), ("minilm", 2, 1)]
)
def test_parallel_ranks_give_the_same_vectors(
    single: dict[str, np.ndarray], qwen3: Path, tmp_path: Path, model: str, tensor: int, pipeline: int
) -> None:
    """Two ranks, two bundles in one group; nothing is left of either afterwards."""
    folder = qwen3 if model == "qwen3" else checkpoints.minilm()
    vectors, groups, ranks = embed(tmp_path, folder, tensor, pipeline)
    assert cosines(vectors, single[model]).min() >= 0.999999
    assert [group["bundles"] for group in groups] == [{0: {"CPU": 1.0}, 1: {"CPU": 1.0}}]
    assert groups[0]["strategy"] == "STRICT_PACK"
    assert ranks == 2


def test_a_killed_rank_ends_its_replica_which_is_replaced(cluster: None, tmp_path: Path) -> None:
    """Kill -9 of one of two ranks: the engine is dead, so the replica ends, and a new one embeds right."""
    handle = deploy(tmp_path, checkpoints.minilm(), 2, 1)
    batch = TokenBatch.of([token_ids(text) for text in TEXTS])
    before = handle.embed.remote(batch).result(timeout_s=60).vectors
    first = rank_processes()
    assert len(first) == 2
    first[0].kill()
    after: list[np.ndarray] = []

    def embeds_again() -> bool:
        # The dying replica answers with errors of several kinds; what counts is that it is replaced.
        with suppress(Exception):
            after.append(handle.embed.remote(batch).result(timeout_s=20).vectors)
        return bool(after)

    wait_for(embeds_again, 240, "a new replica embeds")
    assert cosines(after[0], before).min() >= 0.999999
    assert not {process.pid for process in first} & {process.pid for process in rank_processes()}
    delete()
