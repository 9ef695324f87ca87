"""The second engine serves what vLLM can't, with the vectors of sentence-transformers."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from deployments.config.load import load_workers
from deployments.config.model_files import ModelFiles
from deployments.engine.batch import cosines
from deployments.engine.sentence_transformers import reference
from deployments.engine.tokenizer.loading import check_weights
from deployments.errors import EngineStartError
from deployments.replica.texts import TEXTS
from tests.cluster.test_server import start
from tests.harness import checkpoints, gallery, layouts, workers
from tests.harness.server import program, wait_for

pytestmark = pytest.mark.model

# One process for all of them, and one for sentence-transformers, since vLLM changes classes of transformers.
OURS = """
import json, pickle, sys
from pathlib import Path
from deployments.command.models import embed
from deployments.replica.texts import TEXTS
from deployments.config.load import load_workers
from deployments.plan.plan import Machine, make_plans

for file in json.loads(sys.argv[1]):
    (plan,) = make_plans(load_workers(file), Machine(2, 0, 2))
    Path(file).with_suffix(".pickle").write_bytes(pickle.dumps((plan, embed(plan))))
"""
THEIRS = """
import json, pickle, sys
from pathlib import Path
import numpy as np
from deployments.command.models import compare

for file in json.loads(sys.argv[1]):
    plan, ours = pickle.loads(Path(file).with_suffix(".pickle").read_bytes())
    rows = compare(plan, ours)
    same = [row.what for row in rows if row.ours == row.theirs and row.cosine >= 0.99999]
    plain = ours.together[[use is None for _, use in ours.texts.values()]]
    apart = np.corrcoef(plain) - np.eye(len(plain))
    print(json.dumps([plan.engine, ours.dtype, [row.what for row in rows], same, float(apart.max())]))
"""


def worker_file(folder: Path, name: str, model: Path, more: str = "") -> str:
    """Write a worker file in float32; return its path."""
    file = folder / f"{name}.toml"
    file.write_text(
        workers.vllm(name, model, 'dtype = "float32"').replace("[generator]", f"[generator]{more}")
    )
    return str(file)


def test_every_layout_gives_its_authors_vectors(tmp_path: Path) -> None:
    """Alone and beside others, with each prompt, and cut where the model's own length is; the same tokens."""
    made = [layouts.make(tmp_path / name, layout) for name, layout in gallery.GALLERY.items()]
    files = [worker_file(tmp_path, folder.name, folder) for folder in made]
    files.append(worker_file(tmp_path, "forced", checkpoints.minilm(), '\nengine = "sentence-transformers"'))
    for side in (OURS, THEIRS):
        command = [sys.executable, "-c", side, json.dumps(files)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
    found = dict(zip([*gallery.GALLERY, "forced"], map(json.loads, result.stdout.splitlines()), strict=True))
    for name, (engine, dtype, texts, same, apart) in found.items():
        assert engine == ("vllm" if name in gallery.VLLM else "sentence-transformers"), name
        assert dtype == "float32", name
        prompts = gallery.GALLERY[name].prompts if name in gallery.GALLERY else ()
        assert {*TEXTS, *(f"prompt `{use}`" for use in prompts)} <= set(texts), name
        assert [text for text in texts if text not in same] == [], name
        assert apart < 1 - 1e-5, name  # else an order mistake couldn't show


def test_the_engine_is_chosen_when_the_file_is_read(tmp_path: Path) -> None:
    """By what vLLM would compute otherwise."""
    for name in ("bert-max", "mpnet"):
        folder = layouts.make(tmp_path / name, gallery.GALLERY[name])
        engine, reason = ModelFiles.read(folder).engine(None)
        assert engine == "sentence-transformers"
        assert reason.split(": ")[0] in {"1_Pooling/config.json", "config.json"}
        load_workers(worker_file(tmp_path, name, folder))
    assert ModelFiles.read(checkpoints.minilm()).engine(None)[0] == "vllm"


def test_a_folder_that_cant_be_loaded_is_told_in_a_line(tmp_path: Path) -> None:
    """By each engine, at its first try, with what to do; the other model is served."""
    config = tmp_path / "workers"
    config.mkdir()
    folder = layouts.make(tmp_path / "model", gallery.VLLM["bert-cls"])
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    lack = "generator.model_path: the files of weights lack `encoder.layer.1.output.dense.weight`"
    said = {"vllm": lack, "sentence-transformers": lack}
    for engine in said:
        worker_file(config, engine, folder, f'\nengine = "{engine}"')
    (config / "good.toml").write_text(workers.fake("good"))
    with start(config, tmp_path) as (process, url, log):
        wait_for(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 300, "the table")
        told = [line.partition("s  ")[2] for line in log.read_text().splitlines()]
        for engine, reason in said.items():
            assert f"{engine}: can't start: worker {engine}: {reason}" in told
        body = {"model": "good", "input": "x"}
        assert httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).status_code == 200


def test_a_prompt_is_left_out_of_the_pooling(tmp_path: Path) -> None:
    """Where the model's authors leave theirs out: from a client's text to its vector."""
    config = tmp_path / "workers"
    config.mkdir()
    folder = layouts.make(tmp_path / "model", gallery.SECOND_ENGINE["instructor"])
    worker_file(config, "instructor", folder)
    texts = ["which instructions are left out?", "a sentence"]
    answers = {}
    with start(config, tmp_path) as (process, url, log):
        wait_for(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 300, "the table")
        for use in (None, "query", "document"):
            body = {"model": "instructor", "input": texts} | ({"input_type": use} if use else {})
            answers[use] = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()
    for use, answer in answers.items():
        vectors = np.array([each["embedding"] for each in answer["data"]], np.float32)
        expected, counts = reference(str(folder), [(text, use) for text in texts], layouts.POSITIONS, {})
        assert cosines(vectors, expected).min() >= 0.99999
        assert answer["usage"]["prompt_tokens"] == sum(counts)


def test_weights_of_other_shapes_than_the_config_has_are_refused(tmp_path: Path) -> None:
    """VLLM would take their first rows."""
    folder = layouts.make(tmp_path / "model", gallery.VLLM["bert-cls"])
    check_weights(folder)
    layouts.update(folder / "config.json", intermediate_size=7)
    with pytest.raises(EngineStartError) as refused:
        check_weights(folder)
    assert refused.value.message == (
        "generator.model_path: `encoder.layer.0.intermediate.dense.weight` is [128, 64] in the files of"
        " weights, by config.json [7, 64]"
    )


def test_verify_shows_the_models_vectors_beside_their_authors(tmp_path: Path) -> None:
    """A row for each text and prompt, of both engines; what differs is shown, and the exit status says so."""
    folder = layouts.make(tmp_path / "model", gallery.VLLM["bert-default-prompt"])
    worker_file(tmp_path, "same", folder)
    worker_file(tmp_path, "second", layouts.make(tmp_path / "max", gallery.SECOND_ENGINE["bert-max"]))
    verified = verify(tmp_path)
    assert verified.returncode == 0, verified.stderr[-3000:]
    assert verified.stdout.count("  same  1.000000  ") == 2 * 13 + 1
    assert "second: sentence-transformers, float32" in verified.stdout
    assert "prompt `passage`: 14 tokens" in verified.stdout
    (tmp_path / "second.toml").unlink()
    file = tmp_path / "same.toml"
    file.write_text(file.read_text().replace('"float32"', '"float32", hf_overrides = {hidden_act = "relu"}'))
    verified = verify(tmp_path)
    assert verified.returncode == 1, verified.stderr[-3000:]
    assert "DIFFERENT" in verified.stdout


def verify(path: Path) -> "subprocess.CompletedProcess[str]":
    """Run the command."""
    command = [program("embedding-cluster"), "verify", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
