"""What else the folders of published models hold: other files of weights, other modules, other tokenizers."""

import json
import shutil
from pathlib import Path

from tests.harness.checkpoints import write_json
from tests.harness.layouts import HIDDEN, add_dense, add_module, module, update


def pickled(folder: Path) -> None:
    """Weights as PyTorch's own file, alone."""
    import torch
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def halved(folder: Path) -> None:
    """Weights in float16."""
    import torch
    from transformers import AutoModel

    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)


def sharded(folder: Path) -> None:
    """Weights in several files, with their index."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")


def resaved(folder: Path) -> None:
    """All of it as today's sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    shutil.rmtree(folder)
    model.save(str(folder))


def of_128_tokens(folder: Path) -> None:
    """A length of sentence-transformers' own, below that of the model."""
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})


def cut_left(folder: Path) -> None:
    """A tokenizer that drops what is too much at the start."""
    update(folder / "tokenizer_config.json", truncation_side="left")


def cased(folder: Path) -> None:
    """A tokenizer that keeps capitals and accents, where its own file says otherwise."""
    update(folder / "tokenizer_config.json", do_lower_case=False, strip_accents=False)


def nested(folder: Path) -> None:
    """The transformer in a folder of its own."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in list(folder.iterdir()):
        if file.is_file() and file.name != "modules.json":
            file.rename(inner / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    write_json(folder / "modules.json", [module(0, "Transformer", inner.name), *modules[1:]])


def layer_norm(folder: Path) -> None:
    """A module that vLLM hasn't."""
    import torch

    weights = {"norm.weight": torch.rand(HIDDEN) + 0.5, "norm.bias": torch.rand(HIDDEN)}
    add_module(folder, "LayerNorm", {"dimension": HIDDEN}, weights)


def dense_last(folder: Path) -> None:
    """A layer behind the normalisation."""
    add_dense(folder, HIDDEN, 48)
