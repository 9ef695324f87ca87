"""What sentence-transformers would build of a model's folder, and where vLLM would compute something else.

A wrong vector spoils an index, and nobody sees it for months: what can't be served right is refused, by the
file and the key that say so.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Held equal to sentence-transformers with vLLM, by the gallery in tests/harness. Any other may come out with
# other vectors without a word.
PROVEN = frozenset(
    {
        "bert",
        "gemma3_text",
        "llama",
        "mistral",
        "modernbert",
        "qwen2",
        "qwen3",
        "roberta",
        "xlm-roberta",
    }
)
# Held equal by vLLM's own tests: transformers runs them by code of the hub's.
OF_THE_HUB = frozenset({"gte", "new", "nomic_bert"})
# vLLM doesn't have these, or loses what makes their vectors, as CamemBERT's position offset. ELECTRA's come
# out as NaN in one process and right in the next.
NOT_IN_VLLM = frozenset(
    {"albert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "mt5", "t5"}
)
# The sizes of attention heads that vLLM's CPU kernels have.
CPU_HEADS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
# What vLLM makes of `modules.json`, each from its place on.
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
LIBRARY = "sentence_transformers."
POOLINGS = frozenset({"cls", "cls_token", "mean", "mean_tokens", "lasttoken"})
# A checkpoint of these has its first position at the padding token's id + 1.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl"})
POINTER = b"version https://git-lfs"
TOKENIZERS = ("tokenizer*.json", "*.model", "vocab*", "tokenization_*.py", "*.tiktoken")


def broken(folder: Path) -> Iterator[str]:
    """Yield why no engine can embed as the model's authors do, as `FILE: KEY: REASON`."""
    transformer = transformer_folder(folder)
    modules = (folder / str(module.get("path", "")) for module in modules_of(folder))
    for part in dict.fromkeys((transformer, folder, *modules)):
        for file in sorted(each for each in part.glob("*") if each.is_file()):
            if reason := _unreadable(file):
                yield f"{file.relative_to(folder)}: {reason}"
    for index in transformer.glob("*.index.json"):
        shards = _load(index)
        named = shards.get("weight_map") if isinstance(shards, dict) else None
        for shard in sorted(set(named.values()) if isinstance(named, dict) else ()):
            if not (transformer / str(shard)).is_file():
                yield f"{index.relative_to(folder)}: weight_map: {shard} is missing"
    settings = transformer / "tokenizer_config.json"
    if not any(each != settings for pattern in TOKENIZERS for each in transformer.glob(pattern)):
        yield "tokenizer.json: is missing, and so is every other form of a tokenizer"
    for name, pooling in _poolings(folder):
        if pooling is None:
            yield f"{name}: is missing or broken"


def unfaithful(folder: Path, config: dict[str, Any], head_size: int | None) -> Iterator[str]:
    """Yield where vLLM's vectors would differ from those of sentence-transformers, as `FILE: KEY: REASON`.

    `head_size` is that of an attention head where CPUs compute, which can't have every one.
    """
    kind = config.get("model_type")
    if kind in NOT_IN_VLLM:
        yield f"config.json: model_type: vLLM can't embed with `{kind}`"
    if head_size is not None and head_size not in CPU_HEADS:
        yield f"config.json: num_attention_heads: vLLM's CPU kernels have no heads of {head_size} numbers"
    if transformer_folder(folder) != folder:
        yield "modules.json: 0: vLLM reads no transformer out of a folder of its own"
    if kind == "nomic_bert" and "activation_function" not in config:
        yield "config.json: activation_function: is missing, and vLLM asks for it"
    modules = modules_of(folder)
    types = [str(module.get("type", "")) for module in modules]
    kinds = [name.rpartition(".")[2] if name.startswith(LIBRARY) else name for name in types]
    place = -1
    for number, name in enumerate(kinds):
        after = ORDER.index(name) - place if name in ORDER else 0
        if name not in ORDER:
            yield f"modules.json: {number}: vLLM has no module `{name}`"
        elif after < 0 or (after == 0 and name != "Dense") or (place < 1 and after > 1):
            yield f"modules.json: {number}: vLLM has `{name}` at another place"
        place = max(place, ORDER.index(name)) if name in ORDER else place
    for file, pooling in _poolings(folder):
        yield from _pooling(file, pooling or {})


def unproven(config: dict[str, Any]) -> Iterator[str]:
    """Yield why nobody has shown that vLLM's vectors are the model's own, as `FILE: KEY: REASON`."""
    kind = config.get("model_type")
    if kind not in PROVEN | OF_THE_HUB:
        yield f"config.json: model_type: no test holds vLLM's vectors for `{kind}` equal to its authors'"


def transformer_folder(folder: Path) -> Path:
    """Return the folder with a model's `config.json`: the model's own, or that of its first module."""
    first = next(iter(modules_of(folder)), {})
    inner = str(first.get("path") or "") if str(first.get("type", "")).endswith(".Transformer") else ""
    return folder / inner if inner and (folder / inner / "config.json").is_file() else folder


def modules_of(folder: Path) -> list[dict[str, Any]]:
    """Return the modules that a folder names; none in one that sentence-transformers hasn't written."""
    modules = _load(folder / "modules.json")
    return [each for each in modules if isinstance(each, dict)] if isinstance(modules, list) else []


def _poolings(folder: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each pooling's file and what it holds, None where that can't be read."""
    for module in modules_of(folder):
        if str(module.get("type", "")).endswith(".Pooling"):
            file = f"{module.get('path', '')}/config.json"
            pooling = _load(folder / file)
            yield file, pooling if isinstance(pooling, dict) else None


def _pooling(file: str, pooling: dict[str, Any]) -> Iterator[str]:
    found = {key: key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True}
    modes = {key: mode for key, mode in found.items() if key.startswith("pooling_mode_")}
    if isinstance(mode := pooling.get("pooling_mode"), str):
        modes["pooling_mode"] = mode
    if len(modes) != 1:
        yield f"{file}: {', '.join(modes) or 'pooling_mode'}: vLLM pools in one way, not in {len(modes)}"
    for key, mode in modes.items():
        if mode not in POOLINGS:
            yield f"{file}: {key}: vLLM can't pool by `{mode}`"
    if pooling.get("include_prompt") is False:
        yield f"{file}: include_prompt: vLLM's pooling takes in the prompt"


def _unreadable(file: Path) -> str | None:
    """Return why a file isn't what its name says."""
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            return "is a pointer of Git LFS in place of its content; run `git lfs pull`"
    if file.suffix == ".safetensors":
        try:
            safe_open(file, framework="numpy")
        except SafetensorError as error:
            return f"is broken or cut short: {error}"
    return None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
