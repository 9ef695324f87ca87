"""Small random checkpoints in the layouts of published models, as sentence-transformers reads them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deployments.engine.tokenizer import byte_tokenizer
from tests.harness.checkpoints import minilm, write_json

VOCABULARY, HIDDEN, HEADS, LAYERS = 30522, 64, 2, 2  # heads of 32 numbers, the least that vLLM's CPU takes
POSITIONS = 512
END = "<|endoftext|>"
TYPES = "sentence_transformers.models"


@dataclass(frozen=True)
class Layout:
    """What a folder holds: a model of transformers, its pooling, dense layers behind that, normalisation.

    `dense` has each layer's size and activation; `extra` goes into the model's config as it is. Where
    transformers takes no tokenizer but a model's own, it has that of `bytes`, in that form; else MiniLM's.
    A `bare` one has nothing of sentence-transformers; `default_prompt` is what that puts before each text.
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
    default_prompt: str = ""
    more_pooling: tuple[str, ...] = ()


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

LAYOUTS = {
    "bert-bare": Layout("BertModel", "BertConfig", ENCODER, bare=True),
    "bert-default-prompt": Layout("BertModel", "BertConfig", ENCODER, default_prompt="passage: "),
    "bert-cls": Layout("BertModel", "BertConfig", ENCODER, "cls_token"),
    "bert-mean-dense": Layout("BertModel", "BertConfig", ENCODER, dense=((48, TANH),)),
    "roberta": Layout("RobertaModel", "RobertaConfig", ROBERTA, extra=ABSOLUTE),
    "xlm-roberta": Layout("XLMRobertaModel", "XLMRobertaConfig", ROBERTA, "cls_token"),
    "modernbert": Layout(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **ENCODER,
            **SPECIAL,
            "num_hidden_layers": 4,
            "local_attention": 32,
            "global_attn_every_n_layers": 2,
        },
        "cls_token",
    ),
    "embeddinggemma": Layout(
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            **DECODER,
            "num_hidden_layers": 4,
            "use_bidirectional_attention": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        dense=((96, IDENTITY), (HIDDEN, IDENTITY)),
    ),
    "qwen3": Layout("Qwen3ForCausalLM", "Qwen3Config", DECODER, "lasttoken"),
    "qwen2": Layout("Qwen2ForCausalLM", "Qwen2Config", DECODER, "lasttoken", bytes="Qwen2Tokenizer"),
    "mistral": Layout("MistralModel", "MistralConfig", {**DECODER, "sliding_window": 64}, "lasttoken"),
    "llama": Layout("LlamaModel", "LlamaConfig", DECODER, normalize=False),
}


# Those that vLLM hasn't, or would give other vectors for.
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
SECOND_ENGINE = {
    "bert-max": Layout("BertModel", "BertConfig", ENCODER, "max_tokens"),
    "bert-mean-and-max": Layout("BertModel", "BertConfig", ENCODER, more_pooling=("max_tokens",)),
    "bert-mean-sqrt": Layout("BertModel", "BertConfig", ENCODER, "mean_sqrt_len_tokens"),
    "qwen3-weighted-mean": Layout("Qwen3ForCausalLM", "Qwen3Config", DECODER, "weightedmean_tokens"),
    "mpnet": Layout("MPNetModel", "MPNetConfig", ROBERTA),
    "distilbert": Layout("DistilBertModel", "DistilBertConfig", DISTILBERT),
    "albert": Layout("AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 32}),
    "deberta-v2": Layout("DebertaV2Model", "DebertaV2Config", ENCODER, "cls_token"),
    "camembert": Layout("CamembertModel", "CamembertConfig", ROBERTA),
    "t5-encoder": Layout("T5EncoderModel", "T5Config", T5, dense=((HIDDEN, IDENTITY),)),
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


def make(folder: Path, name: str) -> Path:
    """Write a layout's folder."""
    import torch
    import transformers
    from safetensors.torch import save_file

    layout = (LAYOUTS | SECOND_ENGINE)[name]
    torch.manual_seed(0)
    config = getattr(transformers, layout.config)(**layout.options)
    model: Any = getattr(transformers, layout.model)(config)
    with torch.no_grad():  # larger than a fresh one's, whose vectors are nearly one
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(4)
    model.save_pretrained(folder)
    if layout.extra:
        written = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**written, **dict(layout.extra)})
    write_tokenizer(folder, layout)
    if layout.bare:
        return folder
    if layout.default_prompt:
        settings = {"prompts": {"passage": layout.default_prompt}, "default_prompt_name": "passage"}
        write_json(folder / "config_sentence_transformers.json", settings)
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    pooled = {layout.pooling, *layout.more_pooling}
    pooling = {f"pooling_mode_{mode}": mode in pooled for mode in modes}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN, **pooling})
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    size = HIDDEN * len(pooled)
    for number, (wide, activation) in enumerate(layout.dense, 2):
        path = f"{number}_Dense"
        dense = {"in_features": size, "out_features": wide, "bias": True, "activation_function": activation}
        write_json(folder / path / "config.json", dense)
        linear = torch.nn.Linear(size, wide)
        weights = {f"linear.{key}": value for key, value in linear.state_dict().items()}
        save_file(weights, folder / path / "model.safetensors")
        modules.append(("Dense", path))
        size = wide
    modules += [("Normalize", f"{len(modules)}_Normalize")] if layout.normalize else []
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"{TYPES}.{kind}"}
            for number, (kind, path) in enumerate(modules)
        ],
    )
    return folder
