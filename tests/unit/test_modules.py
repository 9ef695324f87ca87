"""What vLLM would compute otherwise than a model's authors: another engine's, or refused by file and key."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from deployments.__main__ import main
from deployments.config.load import load_workers
from deployments.config.model_files import ModelFiles
from deployments.engine.vllm import VllmEngine
from deployments.errors import ConfigError, EngineStartError
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.harness import checkpoints, gallery, workers
from tests.harness.checkpoints import write_json

TYPES = "sentence_transformers.models."
MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def modules(*names: tuple[str, str]) -> list[dict[str, Any]]:
    """Return what modules.json holds."""
    return [
        {"idx": number, "name": str(number), "path": path, "type": name if "." in name else TYPES + name}
        for number, (name, path) in enumerate(names)
    ]


def make(folder: Path, files: dict[str, Any]) -> Path:
    """Write a small BERT's folder without weights, with these files in place of its own."""
    known: dict[str, Any] = {
        "config.json": {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512},
        "modules.json": modules(*MODULES),
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "tokenizer.json": {},
    }
    folder.mkdir()
    for name, content in (known | files).items():
        if isinstance(content, bytes):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        elif content is not None:
            write_json(folder / name, content)
    return folder


PROMPTS = {"config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": ""}}}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
DENSE = ("Dense", "2_Dense")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mpnet": (
        {"config.json": {"model_type": "mpnet"}},
        "config.json: model_type: vLLM can't embed with `mpnet`",
    ),
    "nomic": (
        {"config.json": {"model_type": "nomic_bert"}},
        "config.json: activation_function: is missing, and vLLM asks for it",
    ),
    "max": (
        {"1_Pooling/config.json": {"pooling_mode_max_tokens": True}},
        "1_Pooling/config.json: pooling_mode_max_tokens: vLLM can't pool by `max_tokens`",
    ),
    "new form": (
        {"1_Pooling/config.json": {"pooling_mode": "weightedmean"}},
        "1_Pooling/config.json: pooling_mode: vLLM can't pool by `weightedmean`",
    ),
    "two": (
        {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
        "1_Pooling/config.json: pooling_mode_mean_tokens, pooling_mode_cls_token:"
        " vLLM pools in one way, not in 2",
    ),
    "no pooling file": ({"1_Pooling/config.json": None}, "1_Pooling/config.json: is missing or broken"),
    "prompt left out": (
        PROMPTS | {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": False}},
        "1_Pooling/config.json: include_prompt: vLLM's pooling takes in the prompt",
    ),
    "layer norm": (
        {"modules.json": modules(*MODULES[:2], ("LayerNorm", "2_LayerNorm"))},
        "modules.json: 2: vLLM has no module `LayerNorm`",
    ),
    "dense before pooling": (
        {"modules.json": modules(MODULES[0], ("Dense", "1_Dense"), ("Pooling", "1_Pooling"))},
        "modules.json: 1: vLLM has `Dense` at another place",
    ),
    "normalised, then dense": (
        {"modules.json": modules(*MODULES, ("Dense", "3_Dense"))},
        "modules.json: 3: vLLM has `Dense` at another place",
    ),
    "custom code": (
        {"modules.json": modules(("custom_st.Transformer", ""), *MODULES[1:])},
        "modules.json: 0: vLLM has no module `custom_st.Transformer`",
    ),
    "unknown to vLLM": (
        {"config.json": {"model_type": "distilbert", "dim": 64, "n_heads": 2}},
        "config.json: model_type: vLLM can't embed with `distilbert`",
    ),
    "transformer in a folder": (
        {
            "config.json": None,
            "0_Transformer/config.json": {"model_type": "bert", "architectures": ["BertModel"]},
            "0_Transformer/tokenizer.json": {},
            "modules.json": modules(("Transformer", "0_Transformer"), *MODULES[1:]),
        },
        "modules.json: 0: vLLM reads no transformer out of a folder of its own",
    ),
    "git lfs": (
        {"model.safetensors": LFS},
        "model.safetensors: is a pointer of Git LFS in place of its content; run `git lfs pull`",
    ),
    "git lfs, a module's": (
        {"2_Dense/model.safetensors": LFS, "modules.json": modules(*MODULES[:2], DENSE)},
        "2_Dense/model.safetensors: is a pointer of Git LFS in place of its content; run `git lfs pull`",
    ),
    "git lfs, the tokenizer": (
        {"tokenizer.json": LFS},
        "tokenizer.json: is a pointer of Git LFS in place of its content; run `git lfs pull`",
    ),
    "cut short": (
        {"model.safetensors": save({"a": np.zeros(100)})[:-8]},
        "model.safetensors: is broken or cut short: Error while deserializing header:"
        " incomplete metadata, file not fully covered",
    ),
    "a shard that is missing": (
        {
            "model.safetensors.index.json": {
                "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
            },
            "model-1-of-2.safetensors": save({"a": np.zeros(100)}),
        },
        "model.safetensors.index.json: weight_map: model-2-of-2.safetensors is missing",
    ),
    "no tokenizer": (
        {"tokenizer.json": None, "tokenizer_config.json": {"do_lower_case": True}},
        "tokenizer.json: is missing, and so is every other form of a tokenizer",
    ),
}


# No engine can serve these.
BROKEN = {
    "no pooling file",
    "git lfs",
    "git lfs, a module's",
    "git lfs, the tokenizer",
    "cut short",
    "a shard that is missing",
    "no tokenizer",
}


def problems(folder: Path, model: Path, more: str = "", arguments: str = "") -> list[str]:
    """Return what is wrong with a model's worker file, with `more` in its generator."""
    file = folder / "worker.toml"
    file.write_text(workers.vllm("m", model, arguments).replace("[generator]", f"[generator]\n{more}"))
    try:
        load_workers(file)
    except ConfigError as error:
        return [line.removeprefix(f"{file}: ") for line in error.message.splitlines()]
    return []


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_computes_otherwise_is_refused_by_file_and_key(tmp_path: Path, case: str) -> None:
    """When the worker file is read and says `vllm`; else the other engine serves it, where that can."""
    files, reason = REFUSED[case]
    folder = make(tmp_path / "model", files)
    refused = problems(tmp_path, folder, 'engine = "vllm"')
    assert refused[0] == f"generator.model_path: {reason}"
    if case in BROKEN:
        assert problems(tmp_path, folder) == refused[:1]
    else:
        assert problems(tmp_path, folder) == []
        assert ModelFiles.read(folder).engine(None) == ("sentence-transformers", reason)


def test_the_second_engine_says_what_it_cant_do(tmp_path: Path) -> None:
    """Ranks, and arguments of vLLM alone."""
    folder = make(tmp_path / "model", REFUSED["max"][0])
    assert problems(tmp_path, folder, "tensor_parallel_size = 2", 'dtype = "float32", seed = 1') == [
        "generator.engine_args.seed: the engine sentence-transformers has no such argument",
        "generator.tensor_parallel_size: the engine sentence-transformers computes on one rank; use 1",
    ]


@pytest.mark.parametrize(
    "files",
    [
        {},
        PROMPTS,
        {"modules.json": modules(*MODULES[:2], DENSE, ("Dense", "3_Dense"), ("Normalize", "4_Normalize"))},
        {"1_Pooling/config.json": {"pooling_mode": "lasttoken", "include_prompt": True}},
        {"modules.json": None},
    ],
)
def test_what_vllm_computes_alike_is_taken(tmp_path: Path, files: dict[str, Any]) -> None:
    """Among it a folder that sentence-transformers hasn't written."""
    found = ModelFiles.read(make(tmp_path / "model", files))
    assert found.objections(None, 1, 1) == []
    assert found.is_bare == ("modules.json" in files and files["modules.json"] is None)


def test_the_plan_knows_a_length_that_the_files_alone_say(tmp_path: Path) -> None:
    """Listings show it."""
    file = tmp_path / "minilm.toml"
    file.write_text(workers.vllm("minilm", checkpoints.minilm()))
    (worker,) = load_workers(file)
    assert worker.generator.max_model_len is None
    (plan,) = make_plans([worker], Machine(1, 0, 1))
    assert plan.worker.generator.max_model_len == 256


def test_the_models_of_packages_are_taken() -> None:
    """As they were published."""
    for folder in (checkpoints.minilm(), checkpoints.sre()):
        assert ModelFiles.read(folder).objections(None, 1, 1) == []


def test_positions_that_no_token_can_have_dont_count(tmp_path: Path) -> None:
    """RoBERTa begins behind its padding token; published as 514, it takes 512 tokens."""
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    folder = make(tmp_path / "model", {"config.json": config})
    assert ModelFiles.read(folder).max_model_len == 512
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 514


def test_a_model_needs_no_worker_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder does in place of one; `init` prints the file that says the same."""
    folder = make(tmp_path / "My Model_v1.5", PROMPTS)
    (worker,) = load_workers(folder)
    assert worker.name == "my-model_v1.5"
    assert worker.generator.model_path == str(folder)
    assert worker.queue.models[worker.name].embedding_task.supported
    assert main(["init", str(folder)]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "worker.toml"
    file.write_text(text)
    assert load_workers(file) == (worker,)
    assert '#   query = "q: "' in text
    assert main(["check", str(folder)]) == 0
    assert "serves my-model_v1.5" in capsys.readouterr().out


def test_a_hubs_id_is_a_model_and_a_missing_file_isnt(tmp_path: Path) -> None:
    """Nor is a folder that is neither a model's nor of worker files."""
    (worker,) = load_workers("BAAI/bge-m3")
    assert (worker.name, worker.generator.model_path) == ("bge-m3", "BAAI/bge-m3")
    for path in ("workers/m.toml", str(tmp_path)):
        with pytest.raises(ConfigError):
            load_workers(path)
        assert main(["init", path]) == 2


def test_a_broken_model_in_place_of_a_worker_file_is_told(tmp_path: Path) -> None:
    """By the folder and the reason."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generator.model_path: a JSON file in .* is broken"):
        load_workers(tmp_path)


def test_a_model_that_the_plan_hasnt_seen_is_held_to_it_where_it_lies(tmp_path: Path) -> None:
    """Chosen unseen, vLLM refuses on its node what it would compute otherwise."""
    file = tmp_path / "worker.toml"
    file.write_text(workers.vllm("m", tmp_path / "model"))
    (plan,) = make_plans(load_workers(file, check_models=False), Machine(2, 0, 2))
    assert (plan.engine, plan.engine_reason) == ("vllm", "the model's files aren't here")
    make(tmp_path / "model", REFUSED["max"][0])
    with pytest.raises(EngineStartError) as refused:
        VllmEngine(plan)._model_folder()
    assert refused.value.message == f"generator.model_path: {REFUSED['max'][1]}"


def test_the_page_lists_the_gallery_and_its_worker_files_load(tmp_path: Path) -> None:
    """Each layout under the engine that serves it."""
    page = (Path(__file__).parents[2] / "deployments" / "config" / "README.md").read_text()
    rows = dict(re.findall(r"^\| (vLLM|sentence-transformers) \| (.*) \|$", page, re.MULTILINE))
    for engine, layouts in (("vLLM", gallery.VLLM), ("sentence-transformers", gallery.SECOND_ENGINE)):
        assert sorted(re.findall(r"`([\w-]+)`", rows[engine])) == sorted(layouts)
    assert len(gallery.GALLERY) >= 40
    whole = [block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[generator]" in block]
    for number, block in enumerate(whole[-2:]):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        (worker,) = load_workers(file)
        assert worker.queue.models[worker.name].embedding_task.supported
    assert worker.generator.engine == "sentence-transformers"
