"""Packed steps give the vectors of vLLM's scheduler, and both those of sentence-transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import gallery, layouts, workers

pytestmark = pytest.mark.model
COUNTS = (1, 7, 64, 1000)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ sep_token or eos_token }}{% endfor %}"

# One process for all: each of them imports vLLM for seconds.
PROGRAM = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
from deployments.config.load import load_workers
from deployments.engine.batch import TokenBatch
from deployments.engine.choice import Packed, Scheduled, choose
from deployments.engine.tokenizer import TextTokenizer
from deployments.engine.vllm import VllmEngine
from deployments.plan.plan import Machine, make_plans

def least(a, b):
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())

counts, *files = json.loads(sys.argv[1])
for file in files:
    (plan,) = make_plans(load_workers(file), Machine(2, 0, 2))
    engine, card = VllmEngine(plan)._load_engine()
    words = [" ".join([str(k), *["word"] * (k % 12)]) for k in range(max(counts))]
    words[3] = "long " * (card.max_model_len - 2)
    texts = [card.default_prompt + text for text in words]
    tokenizer = TextTokenizer.of(card)
    inputs = [
        tokenizer.truncate(ids, card.max_model_len, False, True)
        for ids in tokenizer.encode(texts)
    ]
    scheduled = Scheduled(engine)
    theirs = {count: scheduled.embed(TokenBatch.of(inputs[:count])) for count in counts}
    packed = Packed(engine)
    ours = {count: packed.embed(TokenBatch.of(inputs[:count])) for count in counts}
    begun = [packed.begin(TokenBatch.of(inputs[:count])) for count in (7, 1)]  # as on a GPU
    ahead = np.concatenate([vectors() for vectors in begun])
    alone = np.concatenate([packed.embed(TokenBatch.of([ids])) for ids in inputs[:7]])
    beside = Scheduled(engine, packed)
    author = SentenceTransformer(plan.worker.generator.model_path, device="cpu")
    reference = author.encode(words[:64])
    tokens = author.encode(words[:7], output_value="token_embeddings")
    messages = [{"role": "user", "content": "x"}]
    chat = author.tokenizer.chat_template and author.tokenizer.apply_chat_template(messages, tokenize=False)
    print(json.dumps({
        "longest": max(map(len, inputs)) - card.max_model_len,
        "shape": ours[64].shape == reference.shape,
        "scheduler": min(least(ours[count], theirs[count]) for count in counts),
        "alone": least(ours[7], alone),
        "ahead": least(np.concatenate([ours[7], ours[1]]), ahead),
        "sentence-transformers": least(ours[64], reference),
        "tokens": least(packed.begin(TokenBatch.of(inputs[:7]), True)(), np.concatenate(tokens)),
        # Where the scheduler serves, and after such a call.
        "theirs": least(beside.embed_tokens(TokenBatch.of(inputs[:7])), np.concatenate(tokens)),
        "after": least(beside.embed(TokenBatch.of(inputs[:7])), theirs[7]),
        "apart": 1 - float(np.abs(np.corrcoef(ours[64]) - np.eye(64)).max()),
        "chat": not chat or chat == tokenizer.render([messages], {}, "messages", 10**6)[0],
        "chats": bool(chat and chat.startswith("user: x")),
        "threads": [engine.collective_rpc("use_threads", args=(n,)) for n in (2, 1, 2)][1:] == [[2], [1]],
        "serves": choose(engine, card.tokenizer, card.max_model_len, "packed")[1],
    }), flush=True)
    engine.engine_core.shutdown()
"""


def test_every_layout_gives_its_authors_vectors(tmp_path: Path) -> None:
    """In float32; alone and beside others, few and many, and as long as the model takes."""
    files = []
    for name, layout in gallery.SCHEDULED.items():
        layouts.make(tmp_path / name, layout)
        # A template in the folder of a bare transformer would be put around texts by its authors' side.
        if (tmp_path / name / "modules.json").exists():
            (tmp_path / name / "chat_template.jinja").write_text(CHAT)
        files.append(str(tmp_path / f"{name}.toml"))
        Path(files[-1]).write_text(workers.vllm(name, tmp_path / name, 'dtype = "float32"'))
    argument = json.dumps([COUNTS, *files])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = dict(zip(gallery.SCHEDULED, map(json.loads, result.stdout.splitlines()), strict=True))
    assert sum(each.pop("chats") for each in found.values()) == len(found) - 1
    for name, each in found.items():
        assert each.pop("serves").startswith("packed steps"), name
        assert each.pop("longest") == 0, name
        assert each.pop("shape"), name
        assert each.pop("chat"), name
        assert each.pop("threads"), name
        assert each.pop("apart") > 1e-4, name  # else an order mistake couldn't show
        assert {key: value for key, value in each.items() if value < 0.999999} == {}, name
