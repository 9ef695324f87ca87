"""What sentence-transformers would build of a model's folder, and where vLLM would compute something else.

A wrong vector spoils an index, and nobody sees it for months: what can't be served right is refused, by the
file and the key that say so.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# vLLM doesn't have these, or loses what makes their vectors, as CamemBERT's position offset.
NOT_IN_VLLM = frozenset({"albert", "camembert", "deberta", "deberta-v2", "distilbert", "mpnet", "mt5", "t5"})
# What vLLM makes of `modules.json`, each from its place on.
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
LIBRARY = "sentence_transformers."
POOLINGS = frozenset({"cls", "cls_token", "mean", "mean_tokens", "lasttoken"})
# A checkpoint of these has its first position at the padding token's id + 1.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl"})
POINTER = b"version https://git-lfs"


def broken(folder: Path, prompts: dict[str, str]) -> Iterator[str]:
    """Yield why no engine can embed as the model's authors do, as `FILE: KEY: REASON`."""
    for weights in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with weights.open("rb") as content:
            if content.read(len(POINTER)) == POINTER:
                yield f"{weights.name}: is a pointer of Git LFS in place of weights; run `git lfs pull`"
    for file, pooling in _poolings(folder):
        if pooling is None:
            yield f"{file}: is missing or broken"
        elif pooling.get("include_prompt") is False and any(prompts.values()):
            # Engines get token ids, and don't see where a prompt ends.
            yield f"{file}: include_prompt: a prompt can't be left out of the pooling"


def unfaithful(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield where vLLM's vectors would differ from those of sentence-transformers, as `FILE: KEY: REASON`."""
    kind = config.get("model_type")
    if kind in NOT_IN_VLLM:
        yield f"config.json: model_type: vLLM can't embed with `{kind}`"
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
    yield from _tokenizer(folder)


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


def _tokenizer(folder: Path) -> Iterator[str]:
    """Yield where transformers would not take `tokenizer.json` as it is."""
    settings, tokenizer = _load(folder / "tokenizer_config.json"), _load(folder / "tokenizer.json")
    normalizer = tokenizer.get("normalizer") if isinstance(tokenizer, dict) else None
    if not isinstance(settings, dict) or not isinstance(normalizer, dict):
        return
    if normalizer.get("type") == "BertNormalizer":
        for ours, theirs in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents")):
            if ours in settings and settings[ours] != normalizer.get(theirs):
                yield f"tokenizer_config.json: {ours}: tokenizer.json says {normalizer.get(theirs)}"


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
