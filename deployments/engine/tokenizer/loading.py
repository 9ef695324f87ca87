"""What transformers alone knows of a model's folder: its tokenizer, and which weights there should be."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer, normalizers

from deployments.config.model_files import ModelFiles
from deployments.engine.tokenizer.chat import ChatTemplate
from deployments.errors import EngineStartError, first_line

logger = logging.getLogger("ray.serve")

HUB_OPTIONS = {"revision", "trust_remote_code"}


def read_tokenizer(folder: str, files: ModelFiles | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card holds of the tokenizer of a model folder or hub id. Raises EngineStartError.

    transformers reads it, as for the model's authors: what `tokenizer_config.json` says may change the other.
    """
    from transformers import AutoTokenizer

    try:
        return tokenizer_card(AutoTokenizer.from_pretrained(folder, **hub_options(arguments)), files)
    except (OSError, ValueError, AttributeError) as error:
        raise EngineStartError(f"no fast tokenizer in {folder}: {first_line(error)}") from error


def hub_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of an engine's arguments that say what is taken from a hub."""
    return {name: arguments[name] for name in HUB_OPTIONS & set(arguments)}


def tokenizer_card(loaded: Any, files: ModelFiles | None) -> dict[str, Any]:
    """Return what a card holds of a tokenizer of transformers', as JSON, and of its chat template.

    The tokenizer does before what sentence-transformers does to a text. Raises AttributeError where there is
    no fast one.
    """
    tokenizer, template = loaded.backend_tokenizer, loaded.chat_template
    if isinstance(template, dict):  # by use
        template = template.get("default")
    if files and files.sentence_bert_config.get("do_lower_case"):
        lowercase = [normalizers.Lowercase()]
        if tokenizer.normalizer is not None:
            lowercase.append(tokenizer.normalizer)
        tokenizer.normalizer = normalizers.Sequence(lowercase)
    try:
        ChatTemplate(template or "", loaded.special_tokens_map)
    except Exception as error:  # whatever Python says of what Jinja makes of it
        logger.warning("the chat template isn't one that Jinja reads, so there is none: %s", error)
        template = None
    return {
        "tokenizer": str(tokenizer.to_str()),
        "chat_template": template or "",
        "special_tokens": loaded.special_tokens_map,
    }


def check_vocabulary(serialized: str, vocab_size: int) -> None:
    """Hold a tokenizer against the model's table, which has a row for each of `vocab_size` ids.

    Raises EngineStartError where every text has an id beyond it; warns where some may, which are refused.
    """
    tokenizer = Tokenizer.from_str(serialized)
    last = max(tokenizer.get_vocab().values(), default=0)
    if last < vocab_size:
        return
    what = f"the tokenizer has ids up to {last}, and the model's embedding table {vocab_size} rows"
    if max(tokenizer.encode("a").ids, default=0) >= vocab_size:
        raise EngineStartError(f"{what}: no text can be embedded")
    logger.warning("%s: texts with ids beyond it are refused", what)


def check_weights(folder: Path) -> None:
    """Hold names and shapes of a folder's safetensors against the model that transformers would make of it.

    vLLM starts without a weight that no file gives, and takes the first rows of one that is too large. Nobody
    here reads a pooler's. Raises EngineStartError.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    shapes = _shapes(folder)
    if not shapes:  # PyTorch's own files have to be loaded to be read
        return
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    missing = []
    for name, weight in model.named_parameters():
        wanted = list(weight.shape)
        # A file may have the name of a head's model before it.
        found = shapes.get(name) or next((s for key, s in shapes.items() if key.endswith(f".{name}")), None)
        if found is None and "pooler." not in name:
            missing.append(name)
        elif found is not None and found != wanted:
            raise EngineStartError(
                f"generator.model_path: `{name}` is {found} in the files of weights, by config.json {wanted}"
            )
    if missing:
        raise EngineStartError(lacking(missing))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each weight, by the name that today's models give it."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                known = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # in old files of BERT
                known = known.replace("LayerNorm.beta", "LayerNorm.bias")
                shapes[known] = list(weights.get_slice(name).get_shape())
    return shapes


def lacking(names: Sequence[str]) -> str:
    """Say that no file gives these weights."""
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"generator.model_path: the files of weights lack `{names[0]}`{others}"
