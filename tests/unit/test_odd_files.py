"""Files that people and tools really write: each gets a line with file and key, never a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deployments.config.load import load_workers, read_workers
from deployments.config.model_files import ModelFiles, content_id
from deployments.engine.tokenizer import byte_tokenizer
from deployments.engine.tokenizer.loading import check_vocabulary
from deployments.errors import EngineStartError
from deployments.plan.placement import Machine
from deployments.plan.plan import ingress_replicas, make_plans, unplaceable
from tests.harness import checkpoints, workers
from tests.unit.test_worker_files import NO_GPU, write, write_config


def problems_of(folder: Path, text: str, environ: dict[str, str] | None = None) -> dict[str, str]:
    """Return the messages of a worker file by key."""
    _, problems = read_workers(write(folder, "w.toml", text), environ=environ or {})
    return {problem.key: problem.message for problem in problems}


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ("edition = true", "edition"),
        ("edition = 1.0", "edition"),
        ("edition = 1\ngenerator = 3", "generator"),
        ("edition = 1\n[[generator]]", "generator"),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path: Path, wrong: str, key: str) -> None:
    """Whatever stands in its place."""
    assert key in problems_of(tmp_path, wrong)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("[deployment.autoscaling]\nmin_replicas = 2\nmax_replicas = 1", "deployment.autoscaling"),
        ("[deployment.autoscaling]\ninitial_replicas = 5\nmax_replicas = 2", "deployment.autoscaling"),
        ("[deployment]\nresources = {CPU = 7}", "deployment.resources"),
        ('[monitoring]\ntcp_probes = ["host:99999"]', "monitoring.tcp_probes"),
        ("[deployment]\nnum_replicas = 1\nautoscaling = {}", "deployment"),
    ],
)
def test_what_would_fail_later_is_refused_now(tmp_path: Path, more: str, key: str) -> None:
    """Before Ray or a replica finds out."""
    assert key in problems_of(tmp_path, workers.fake("m", more=more))


def test_the_ingress_keeps_its_name(tmp_path: Path) -> None:
    """Two deployments of one name would be one."""
    assert "queue.checkpoint_name" in problems_of(tmp_path, workers.fake("ingress"))


def test_the_fake_engine_checks_its_arguments(tmp_path: Path) -> None:
    """By name and type, as vLLM's are."""
    found = problems_of(tmp_path, workers.fake("m", 'dimension = "x"'))
    assert any("dimension" in key + message for key, message in found.items()), found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ('"m".embedding_tasks', "unknown key; did you mean `embedding_task`?"),
        ('"m".embedding_task.prompt', "unknown key; did you mean `prompts`?"),
        ("a.b.c.embedding_task", 'a name with dots must be quoted: write [queue.models."a.b.c"]'),
    ],
)
def test_typos_and_dots_are_told_apart(tmp_path: Path, name: str, message: str) -> None:
    """A typo in a table's name looks like a name with dots, and isn't one."""
    text = workers.fake("m") + f"\n[queue.models.{name}]\nsupported = true\n"
    assert message in problems_of(tmp_path, text).values()


def test_a_variable_that_fits_nowhere_is_named(tmp_path: Path) -> None:
    """Rather than blamed on the file."""
    found = problems_of(tmp_path, workers.fake("m"), {"WORKER__ID": "7", "WORKER__EDITION__X": "1"})
    assert "WORKER__ID" in found["id"]
    assert "WORKER__EDITION__X" in found["edition"]


@pytest.mark.parametrize("token", ["12345", "true", "2024-01-01", '"quoted"', "a#b"])
def test_a_token_of_any_form_stays_as_it_is(tmp_path: Path, token: str) -> None:
    """Variables are read as TOML but for keys that hold text."""
    file = write(tmp_path, "w.toml", workers.fake("m"))
    (worker,) = load_workers(file, environ={"WORKER__QUEUE__TOKEN": token, "WORKER__QUEUE__VERSION": "1.2"})
    assert worker.queue.token is not None
    assert worker.queue.token.get_secret_value() == token
    assert worker.queue.version == "1.2"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """Some editors put one first."""
    file = tmp_path / "w.toml"
    file.write_text(workers.fake("m"), encoding="utf-8-sig")
    assert load_workers(file, environ={})


ODD: list[dict[str, Any]] = [
    {"num_attention_heads": "4x"},
    {"num_attention_heads": [4]},
    {"num_hidden_layers": [1]},
    {"architectures": {"a": 1}},
    {"architectures": 3},
    {"max_position_embeddings": "512"},
    {"max_position_embeddings": float("inf")},
    {"rope_scaling": "linear"},
    {"hidden_size": "64"},
    {"text_config": 3},
]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_config_json_is_read_for_what_it_says(tmp_path: Path, odd: dict[str, Any]) -> None:
    """What can't be understood is left to the engine; nothing here falls over it."""
    model = write_config(tmp_path / "model", **odd)
    file = write(tmp_path, "w.toml", workers.vllm("m", model))
    (plan,) = make_plans(load_workers(file, environ={}), NO_GPU)
    assert plan.engine_args["runner"] == "pooling"


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", "\xff"])
def test_a_broken_config_json_is_a_problem_with_the_model(tmp_path: Path, content: str) -> None:
    """Named by the key that led there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(content, encoding="latin-1")
    assert list(problems_of(tmp_path, workers.vllm("m", model))) == ["generator.model_path"]


def test_prompts_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    """A null would otherwise become the word None before every query."""
    model = write_config(tmp_path / "model")
    prompts = {"prompts": {"query": "find: ", "document": "", "other": None}}
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert ModelFiles.read(model).prompts == {"query": "find: ", "document": ""}


def test_a_secret_engine_argument_isnt_printed(tmp_path: Path) -> None:
    """A hub's token reaches the engine and nobody else."""
    model = write_config(tmp_path / "model")
    file = write(tmp_path, "w.toml", workers.vllm("m", model, 'hf_token = "hf_secret", seed = 1'))
    (plan,) = make_plans(load_workers(file, environ={}), NO_GPU)
    assert "hf_secret" not in json.dumps(plan.describe())
    assert plan.engine_args["hf_token"] == "hf_secret"
    assert plan.describe()["engine_args"]["seed"] == 1


def test_a_machine_that_is_too_small_is_told_before_anything_waits(tmp_path: Path) -> None:
    """Three workers on two cores; a GPU where there is none."""
    for name in "abc":
        write(tmp_path, f"{name}.toml", workers.vllm(name, checkpoints.minilm()))
    machine = Machine(cpus=2, gpus=0, cpus_per_node=2)
    plans = make_plans(load_workers(tmp_path, environ={}), machine)
    assert len(unplaceable(plans[:2], machine)) == 0
    (problem,) = unplaceable(plans, machine)
    assert "worker `c` needs 1 CPUs" in problem
    write(tmp_path, "a.toml", workers.vllm("a", checkpoints.minilm(), more="[deployment]\nnum_gpus = 1"))
    plans = make_plans(load_workers(tmp_path / "a.toml", environ={}), machine)
    assert "1 GPUs" in unplaceable(plans, machine)[0]


@pytest.mark.parametrize(("cpus", "gpus", "replicas"), [(2, 0, 1), (16, 0, 1), (16, 1, 4), (192, 8, 8)])
def test_http_has_as_many_processes_as_there_are_cores_beside_engines(
    tmp_path: Path, cpus: int, gpus: int, replicas: int
) -> None:
    """Engines on CPUs take what there is, unless they are told; those on GPUs leave nearly all."""
    more = f"[deployment]\nnum_gpus = {min(gpus, 1)}"
    write(tmp_path, "a.toml", workers.vllm("a", checkpoints.minilm(), more=more))
    machine = Machine(cpus=cpus, gpus=gpus, cpus_per_node=cpus)
    plans = make_plans(load_workers(tmp_path, environ={}), machine)
    assert ingress_replicas(plans, machine) == replicas


def test_a_tokenizer_that_knows_more_than_the_model_is_told_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Texts with such tokens are refused; where that is every text, the model doesn't start."""
    check_vocabulary(byte_tokenizer(), 256)
    assert not caplog.records
    check_vocabulary(byte_tokenizer(), 200)
    assert "ids up to 255, and the model's embedding table 200 rows" in caplog.text
    with pytest.raises(EngineStartError, match="no text can be embedded"):
        check_vocabulary(byte_tokenizer(), 10)


@pytest.mark.parametrize(
    "hidden", [".DS_Store", ".cache/huggingface/download/config.json.metadata", ".git/HEAD", "1_Pooling/.x"]
)
def test_hidden_files_are_no_part_of_a_model(tmp_path: Path, hidden: str) -> None:
    """What a file manager, a hub or git leaves in its folder changes nothing; any other file does."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    before = content_id(folder)
    (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
    (folder / hidden).write_text("anything")
    assert content_id(folder) == before
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert content_id(folder) != before
    inside = tmp_path / ".cache" / "model"  # the folder's own place says nothing
    shutil.copytree(folder, inside)
    assert content_id(inside) == content_id(folder)
