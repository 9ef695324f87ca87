"""Worker files: what loads, what is refused, and what is said of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.command.summary import plan_table
from deployments.config.load import load_workers, read_workers
from deployments.errors import ConfigError
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans, unplaceable
from tests.harness import checkpoints, workers

ONE_GPU = Machine(cpus=8, gpus=1, cpus_per_node=8)
NO_GPU = Machine(cpus=8, gpus=0, cpus_per_node=8)


def write_config(folder: Path, architecture: str = "Qwen3ForCausalLM", **config: object) -> Path:
    """Write a model folder without weights."""
    folder.mkdir(parents=True)
    known = {"max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 36}
    kind = "qwen3" if architecture.startswith("Qwen3") else "bert"
    content = {"architectures": [architecture], "model_type": kind, **known, **config}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    """Write one file and return its path."""
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published example, its weights folder in place."""
    folder = write_config(tmp_path / "weights", hidden_size=4096, num_key_value_heads=8, head_dim=128)
    return write(
        tmp_path,
        "config.toml",
        workers.PUBLISHED.replace("/path/to/weights/Qwen/Qwen3-Embedding-8B", str(folder)),
    )


def test_the_published_example_is_refused_while_its_weights_folder_is_missing(tmp_path: Path) -> None:
    """The one problem names the key and the folder."""
    file = write(tmp_path, "config.toml", workers.PUBLISHED)
    _, problems = read_workers(file, environ={})
    assert [(p.key, p.message) for p in problems] == [
        ("generator.model_path", "no such folder: /path/to/weights/Qwen/Qwen3-Embedding-8B")
    ]


def test_the_published_example_is_planned_as_documented(published: Path) -> None:
    """A pooling runner, TP 1, PP 1, one bundle with one GPU."""
    (worker,) = load_workers(published, environ={})
    (plan,) = make_plans([worker], ONE_GPU)
    shown = plan.describe()
    assert shown["engine_args"]["runner"] == "pooling"
    assert shown["engine_args"]["convert"] == "embed"
    assert (shown["tensor_parallel_size"], shown["pipeline_parallel_size"]) == (1, 1)
    assert shown["placement_group"]["bundles"] == [{"CPU": 1.0, "GPU": 1.0}]
    assert shown["metrics_port"] == 4000
    assert worker.queue.http_request_retries == 7


def test_a_token_is_never_shown(published: Path) -> None:
    """Neither by the worker, nor by the plan, which doesn't hold it at all."""
    (worker,) = load_workers(published, environ={})
    (plan,) = make_plans([worker], ONE_GPU)
    shown = repr(worker) + str(worker.model_dump()) + repr(plan) + json.dumps(plan.describe())
    assert "worker-token" not in shown
    assert plan.worker.queue.token is None
    assert worker.queue.token is not None
    assert worker.queue.token.get_secret_value() == "worker-token"


MISTAKES = {
    "generator.max_num_seq": ("max_num_seqs = 16", "max_num_seq = 16", "did you mean `max_num_seqs`?"),
    "generator.type": ('type = "vllm"', 'type = "luminous"', "'luminous'"),
    "edition": ("edition = 1", "edition = 2", "must be 1, not 2"),
    "queue.version": ("version = 1\n", "version = 1.5\n", "valid"),
    "generator.max_model_len": ("max_model_len = 2048", "max_model_len = 8192", "above the model's own 4096"),
    "generator.tensor_parallel_size": (
        "tensor_parallel_size = 1",
        "tensor_parallel_size = 5",
        "32 attention heads can't be divided by 5",
    ),
    "queue.models.qwen3-embedding-0": (
        '[queue.models."qwen3-embedding-8b"',
        "[queue.models.qwen3-embedding-0.6b",
        'write [queue.models."qwen3-embedding-0.6b"]',
    ),
    "monitoring.metrics_port": ("metrics_port = 4000", 'metrics_port = "4000"', "valid integer"),
    "monitoring.tcp_probes.0": ("tcp_probes = []", 'tcp_probes = ["localhost"]', "'localhost'"),
    "queue.checkpoint_name": ('checkpoint_name = "qwen3-embedding-8b"\n', "", "is missing"),
}


def test_ten_mistakes_in_a_folder_are_all_found_in_one_run(published: Path, tmp_path: Path) -> None:
    """Each with its file and key; the command exits with 2 and has imported neither torch nor ray."""
    folder = tmp_path / "workers"
    folder.mkdir()
    text = published.read_text()
    for number, (right, wrong, _) in enumerate(MISTAKES.values()):
        assert right in text
        write(folder, f"{number}.toml", text.replace(right, wrong).replace("]]", "]"))
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deployments", "check", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    for number, (key, (_, _, message)) in enumerate(MISTAKES.items()):
        assert any(
            line.startswith(f"{folder / f'{number}.toml'}: ")
            and f": {key}" in line.replace('"', "")
            and message in line
            for line in lines
        ), (key, message, result.stderr[-3000:])
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "pydantic" in imported
    assert not {"torch", "ray", "vllm", "numpy"} & imported


def test_a_file_with_several_mistakes_shows_them_all(published: Path) -> None:
    """Reading doesn't stop at the first."""
    text = published.read_text().replace("edition = 1", "edition = 3")
    published.write_text(text.replace("max_num_seqs = 16", "max_num_seqs = 0\nfoo = 1"))
    _, problems = read_workers(published, environ={})
    assert {p.key for p in problems} == {"edition", "generator.max_num_seqs", "generator.foo"}


def test_a_broken_file_hides_nothing_of_the_others(tmp_path: Path) -> None:
    """The sound worker is there beside the problem, which says line and column."""
    write(tmp_path, "a.toml", "edition = = 1")
    sound = write(tmp_path, "b.toml", workers.fake("b"))
    found, problems = read_workers(tmp_path, environ={})
    assert list(found) == [sound]
    assert len(problems) == 1
    assert "line 1, column 11" in problems[0].message


def test_two_files_may_not_share_a_public_name(tmp_path: Path) -> None:
    """The second one is refused, by name and file."""
    write(tmp_path, "a.toml", workers.fake("a"))
    write(tmp_path, "b.toml", workers.fake("b").replace('models."b"', 'models."a"'))
    with pytest.raises(ConfigError, match=r"b\.toml: queue\.models: `a` is taken by a\.toml"):
        load_workers(tmp_path, environ={})


def test_an_encoder_cant_be_pipeline_parallel(tmp_path: Path) -> None:
    """Found from the model's own config.json."""
    file = write(
        tmp_path,
        "w.toml",
        workers.worker(
            "m", f'type = "vllm"\nmodel_path = "{checkpoints.minilm()}"\npipeline_parallel_size = 2'
        ),
    )
    _, problems = read_workers(file, environ={})
    assert [p.key for p in problems] == ["generator.pipeline_parallel_size"]
    assert "BertModel is an encoder" in problems[0].message


def test_a_model_may_not_be_longer_than_its_sentence_length(tmp_path: Path) -> None:
    """sentence_bert_config.json says 256 for MiniLM, though its positions go to 512."""
    generator = f'type = "vllm"\nmodel_path = "{checkpoints.minilm()}"\nmax_model_len = 512'
    _, problems = read_workers(write(tmp_path, "w.toml", workers.worker("m", generator)), environ={})
    assert [str(p.message) for p in problems] == ["512 is above the model's own 256"]


def test_the_environment_overrides_every_file_or_one(tmp_path: Path) -> None:
    """A variable with the file's name wins over the general one; secrets can come this way."""
    write(tmp_path, "a.toml", workers.fake("a"))
    write(tmp_path, "b-2.toml", workers.fake("b"))
    environ = {
        "WORKER__GENERATOR__MAX_NUM_SEQS": "8",
        "WORKER_B_2__GENERATOR__MAX_NUM_SEQS": "9",
        "WORKER__QUEUE__TOKEN": "from-the-environment",
    }
    a, b = load_workers(tmp_path, environ=environ)
    assert (a.generator.max_num_seqs, b.generator.max_num_seqs) == (8, 9)
    assert a.queue.token is not None
    assert a.queue.token.get_secret_value() == "from-the-environment"


def test_engine_arguments_are_checked_by_name(tmp_path: Path) -> None:
    """A typo gets a suggestion; what has a key of its own is sent there."""
    text = workers.vllm("m", checkpoints.minilm(), "dtyp = 'float32', max_model_len = 3")
    _, problems = read_workers(write(tmp_path, "w.toml", text), environ={})
    shown = {p.key: p.message for p in problems}
    assert shown["generator.engine_args.dtyp"] == "not an engine argument; did you mean `dtype`?"
    assert "use generator.max_model_len" in shown["generator.engine_args"]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """A package:// path whose package isn't installed."""
    text = workers.vllm("m", Path("package://no_such_package/model")).replace("package:/no", "package://no")
    _, problems = read_workers(write(tmp_path, "w.toml", text), environ={})
    assert [p.message for p in problems] == ["the Python package `no_such_package` isn't installed"]


@pytest.mark.parametrize(
    ("machine", "more", "bundles", "strategy"),
    [
        (NO_GPU, "", [{"CPU": 4.0}, {"CPU": 4.0}], "STRICT_PACK"),
        (NO_GPU, "[deployment]\nnum_cpus = 1", [{"CPU": 1.0}, {"CPU": 1.0}], "STRICT_PACK"),
        (ONE_GPU, "", [{"CPU": 1.0, "GPU": 2.0}], "STRICT_PACK"),
        (
            ONE_GPU,
            '[deployment]\nplacement_group_strategy = "PACK"',
            [{"CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}],
            "PACK",
        ),
    ],
)
def test_bundles_follow_ranks_devices_and_strategy(
    tmp_path: Path, machine: Machine, more: str, bundles: list[dict[str, float]], strategy: str
) -> None:
    """The replica and its two ranks share one placement group."""
    folder = write_config(tmp_path / "model")
    generator = f'type = "vllm"\nmodel_path = "{folder}"\ntensor_parallel_size = 2'
    file = write(tmp_path, "w.toml", workers.worker("m", generator, more))
    (plan,) = make_plans(load_workers(file, environ={}), machine)
    options = plan.deployment_options
    assert options["placement_group_bundles"] == bundles
    assert options["placement_group_strategy"] == strategy
    spans_nodes = machine.gpus and strategy == "PACK"
    assert plan.engine_args["distributed_executor_backend"] == ("ray" if spans_nodes else "mp")


def test_cpu_workers_share_the_cores_evenly(tmp_path: Path) -> None:
    """Each replica that there may be counts, and a worker that names a number keeps it."""
    write(tmp_path, "a.toml", workers.vllm("a", checkpoints.minilm(), more="[deployment]\nnum_replicas = 3"))
    write(tmp_path, "b.toml", workers.vllm("b", checkpoints.sre(), more="[deployment]\nnum_cpus = 2"))
    a, b = make_plans(load_workers(tmp_path, environ={}), NO_GPU)
    assert (a.cores_per_rank, b.cores_per_rank) == (2, 2)


def test_gpu_workers_are_left_their_cores(tmp_path: Path) -> None:
    """The CPU worker beside them takes the rest."""
    model = write_config(tmp_path / "model")
    write(tmp_path, "a.toml", workers.vllm("a", checkpoints.minilm()))
    write(tmp_path, "b.toml", workers.vllm("b", model, more="[deployment]\nnum_gpus = 1"))
    plans = make_plans(load_workers(tmp_path, environ={}), ONE_GPU)
    assert plans[0].cores_per_rank == 7
    assert not unplaceable(plans, ONE_GPU)


def test_replicas_may_share_a_gpu(tmp_path: Path) -> None:
    """Each with its part of the memory; ranks can't, and the plan says when one engine would do."""
    part = "[deployment]\nnum_gpus = 0.25\nnum_replicas = 4"
    file = write(tmp_path, "a.toml", workers.vllm("a", checkpoints.minilm(), more=part))
    (plan,) = make_plans(load_workers(file, environ={}), ONE_GPU)
    assert plan.bundles == ({"CPU": 1.0, "GPU": 0.25},)
    assert plan.ray_actor_options["num_gpus"] == 0.25
    assert plan.engine_args["gpu_memory_utilization"] == 0.225
    assert not unplaceable([plan], ONE_GPU)
    note = plan_table([plan]).splitlines()[-1]
    assert note.startswith("a: one engine keeps an H100 busy with texts of 224 tokens or more; with shorter")
    whole = write(tmp_path, "a.toml", file.read_text().replace("0.25", "1"))
    assert "gpu_memory_utilization" not in make_plans(load_workers(whole, environ={}), ONE_GPU)[0].engine_args
    split = file.read_text().replace("num_gpus = 1", "num_gpus = 0.5")
    write(tmp_path, "a.toml", split.replace("[generator]", "[generator]\ntensor_parallel_size = 2"))
    with pytest.raises(ConfigError) as refused:
        load_workers(file, environ={})
    assert str(refused.value) == f"{file}: deployment.num_gpus: ranks can't share a GPU; use 1"


def test_check_tells_what_plan_would_refuse(published: Path) -> None:
    """Every mistake at once, with file and key, where the file says that it runs on CPUs."""
    text = published.read_text().replace("pipeline_parallel_size = 1", "pipeline_parallel_size = 2")
    text = text.replace("[queue]", "engine_args = {enforce_eager = true}\n[queue]", 1)
    text += '[deployment]\nplacement_group_strategy = "PACK"\n'
    published.write_text(text)
    folder = published.parent
    other = text.replace("qwen3-embedding-8b", "other").replace("4000", "4001")
    write(folder, "other.toml", other)
    reasons = [
        (
            "deployment.placement_group_strategy",
            "`PACK` may put ranks on several nodes, which vLLM can't do on CPUs; use `STRICT_PACK`",
        ),
        ("generator.engine_args.enforce_eager", "pipeline stages can't run eagerly on CPUs; leave it out"),
    ]
    with pytest.raises(ConfigError) as caught:
        make_plans(load_workers(folder, environ={}), NO_GPU)
    assert caught.value.message.splitlines() == [
        f"worker `{name}`: {key}: {reason}"
        for name in ("qwen3-embedding-8b", "other")
        for key, reason in reasons
    ]
    assert len(make_plans(load_workers(folder, environ={}), ONE_GPU)) == 2
    published.write_text(f"{text}num_gpus = 0\n")
    write(folder, "other.toml", f"{other}num_gpus = 0\n")
    _, problems = read_workers(folder, environ={})
    assert [(Path(p.file).name, p.key, p.message) for p in problems] == [
        (name, key, reason) for name in ("config.toml", "other.toml") for key, reason in reasons
    ]
