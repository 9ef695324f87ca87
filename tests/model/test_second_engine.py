"""The second engine serves what vLLM can't, with the vectors of sentence-transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.config.load import load_workers
from deployments.config.model_files import ModelFiles
from tests.harness import checkpoints, layouts, workers
from tests.harness.server import program

pytestmark = pytest.mark.model

PROGRAM = """
import asyncio, json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
from deployments.config.load import load_workers
from deployments.engine import make_engine
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.plan.plan import Machine, make_plans

for file in json.loads(sys.argv[1]):
    (plan,) = make_plans(load_workers(file), Machine(2, 0, 2))
    engine = make_engine(plan)
    card = engine.start()
    words = [" ".join([str(k), *["word"] * (k % 12)]) for k in range(64)]
    words[3] = "long " * 600
    tokenizer = TextTokenizer(card.tokenizer)
    inputs = [
        tokenizer.truncate(ids, card.max_model_len, False, True)
        for ids in tokenizer.encode(words)
    ]
    ours = asyncio.run(engine.embed(TokenBatch.of(inputs)))
    alone = np.concatenate([asyncio.run(engine.embed(TokenBatch.of([ids]))) for ids in inputs[:5]])
    theirs = SentenceTransformer(plan.worker.generator.model_path, device="cpu")
    theirs = theirs.encode(words)
    least = lambda a, b: float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    apart = 1 - float(np.abs(np.corrcoef(ours) - np.eye(64)).max())
    found = [ours.shape == theirs.shape == (64, card.dimension), least(ours, theirs), least(ours[:5], alone)]
    print(json.dumps([plan.engine, *found, apart, card.steps]), flush=True)
    engine.stop()
"""


def worker_file(folder: Path, name: str, model: Path, more: str = "") -> str:
    """Write a worker file in float32; return its path."""
    file = folder / f"{name}.toml"
    file.write_text(
        workers.vllm(name, model, 'dtype = "float32"').replace("[generator]", f"[generator]{more}")
    )
    return str(file)


def test_what_vllm_hasnt_is_served_all_the_same(tmp_path: Path) -> None:
    """Each of them alone and beside others, and cut where the model's own length is; the plan says why."""
    names = list(layouts.SECOND_ENGINE)
    files = [worker_file(tmp_path, name, layouts.make(tmp_path / name, name)) for name in names]
    files.append(worker_file(tmp_path, "forced", checkpoints.minilm(), '\nengine = "sentence-transformers"'))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(files)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = dict(zip([*names, "forced"], map(json.loads, result.stdout.splitlines()), strict=True))
    for name, (engine, shape, cosine, alone, apart, why) in found.items():
        assert engine == "sentence-transformers", name
        assert shape, name
        assert min(cosine, alone) >= 0.99999, (name, cosine, alone)
        assert apart > 1e-5, name
        assert why.startswith("sentence-transformers: "), name


def test_the_engine_is_chosen_when_the_file_is_read(tmp_path: Path) -> None:
    """By what vLLM would compute otherwise."""
    for name in ("bert-max", "mpnet"):
        folder = layouts.make(tmp_path / name, name)
        engine, reason = ModelFiles.read(folder).engine(None)
        assert engine == "sentence-transformers"
        assert reason.split(": ")[0] in {"1_Pooling/config.json", "config.json"}
        load_workers(worker_file(tmp_path, name, folder))
    assert ModelFiles.read(checkpoints.minilm()).engine(None)[0] == "vllm"


def test_verify_shows_the_models_vectors_beside_their_authors(tmp_path: Path) -> None:
    """A row for each text and prompt, of both engines; what differs is shown, and the exit status says so."""
    folder = layouts.make(tmp_path / "model", "bert-default-prompt")
    worker_file(tmp_path, "same", folder)
    worker_file(tmp_path, "second", layouts.make(tmp_path / "max", "bert-max"))
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
