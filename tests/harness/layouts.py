"""Small random checkpoints in the layouts of published models, as sentence-transformers reads them."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deployments.engine.tokenizer import byte_tokenizer
from tests.harness.checkpoints import minilm, write_json

VOCABULARY, HIDDEN, HEADS, LAYERS = 30522, 64, 2, 2  # heads of 32 numbers, the least that vLLM's CPU takes
POSITIONS = 512
END = "<|endoftext|>"
MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


@dataclass(frozen=True)
class Layout:
    """What a folder holds: a model of transformers, its pooling, dense layers behind that, normalisation.

    `dense` has each layer's size and activation; `extra` goes into the model's config as it is. Where
    transformers takes no tokenizer but a model's own, it has that of `bytes`, in that form; else MiniLM's.
    A `bare` one has nothing of sentence-transformers; `default_prompt` is the prompt put before each text for
    which none is named, and with `pools_prompt` among what is pooled. `edit` changes the folder at last.
    """

    model: str
    config: str
    options: dict[str, Any]
    pooling: str = "mean_tokens"
    dense: tuple[tuple[int, str], ...] = ()
    normalize: bool = True
    extra: tuple[tuple[str, Any], ...] = ()
    bytes: str = ""
    bare: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    pools_prompt: bool = True
    more_pooling: tuple[str, ...] = ()
    edit: Callable[[Path], None] | None = None


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": POSITIONS,
}
ROBERTA = {**ENCODER, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "type_vocab_size": 1}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 32}
# Published configs have the key; those that transformers 5 writes don't, and vLLM asks for it.
ABSOLUTE = (("position_embedding_type", "absolute"),)
SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "cls_token_id": 101,
    "sep_token_id": 102,
}
IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"

DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": 2 * HIDDEN,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 32,
    "d_ff": 2 * HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}


def write_tokenizer(folder: Path, layout: Layout) -> None:
    """Write a layout's tokenizer."""
    if layout.bytes:
        tokenizer = Tokenizer.from_str(byte_tokenizer())
        tokenizer.add_special_tokens([END])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": layout.bytes, "eos_token": END, "pad_token": END}
    else:
        for file in ("vocab.txt", "special_tokens_map.json", "tokenizer.json"):
            shutil.copy(minilm() / file, folder / file)
        config = json.loads((minilm() / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "model_max_length": POSITIONS})


def make(folder: Path, layout: Layout) -> Path:
    """Write a layout's folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, layout.config)(**layout.options)
    model: Any = getattr(transformers, layout.model)(config)
    with torch.no_grad():  # larger than a fresh one's, whose vectors are nearly one
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(4)
    model.save_pretrained(folder)
    if layout.extra:
        update(folder / "config.json", **dict(layout.extra))
    write_tokenizer(folder, layout)
    if not layout.bare:
        write_modules(folder, layout)
    if layout.edit:
        layout.edit(folder)
    return folder


def write_modules(folder: Path, layout: Layout) -> None:
    """Write what sentence-transformers puts beside a model."""
    if layout.prompts:
        settings = {"prompts": dict(layout.prompts), "default_prompt_name": layout.default_prompt or None}
        write_json(folder / "config_sentence_transformers.json", settings)
    write_json(folder / "modules.json", [module(0, "Transformer", "")])
    pooled = {layout.pooling, *layout.more_pooling}
    pooling = {f"pooling_mode_{mode}": mode in pooled for mode in MODES}
    pooling["include_prompt"] = layout.pools_prompt
    add_module(folder, "Pooling", {"word_embedding_dimension": HIDDEN, **pooling})
    size = HIDDEN * len(pooled)
    for wide, activation in layout.dense:
        add_dense(folder, size, wide, activation)
        size = wide
    if layout.normalize:
        add_module(folder, "Normalize", {})


def add_dense(folder: Path, size: int, wide: int, activation: str = IDENTITY) -> None:
    """Put a layer with random weights behind the modules that are there."""
    import torch

    dense = {"in_features": size, "out_features": wide, "bias": True, "activation_function": activation}
    linear = torch.nn.Linear(size, wide).state_dict()
    add_module(folder, "Dense", dense, {f"linear.{key}": value for key, value in linear.items()})


def add_module(
    folder: Path, kind: str, settings: dict[str, Any], weights: dict[str, Any] | None = None
) -> None:
    """Put a module behind those that are there."""
    from safetensors.torch import save_file

    modules = json.loads((folder / "modules.json").read_text())
    modules.append(module(len(modules), kind, f"{len(modules)}_{kind}"))
    path = folder / modules[-1]["path"]
    write_json(path / "config.json", settings)
    if weights:
        save_file(weights, path / "model.safetensors")
    write_json(folder / "modules.json", modules)


def module(number: int, kind: str, path: str) -> dict[str, Any]:
    """Return what modules.json says of one of them."""
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


def update(file: Path, **values: Any) -> None:
    """Change some values of a file in JSON."""
    write_json(file, {**json.loads(file.read_text()), **values})
