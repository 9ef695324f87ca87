"""What a model's own files say, read without importing an engine.

Field names follow Hugging Face's `config.json`; how they combine into a maximum length and into
what can be parallelised follows vLLM's `config/model.py` and its models' `SupportsPP` marks.
"""

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from deployments.config.modules import (
    OFFSET_POSITIONS,
    broken,
    modules_of,
    transformer_folder,
    unfaithful,
    unproven,
)

PACKAGE = "package://"

# Encoders: vLLM has no pipeline-parallel version of these.
NO_PIPELINE_PARALLEL = frozenset(
    {
        "BertForMaskedLM",
        "BertModel",
        "BertSpladeSparseEmbeddingModel",
        "BgeM3EmbeddingModel",
        "CamembertModel",
        "DistilBertModel",
        "ElectraModel",
        "Gemma3TextModel",
        "GteModel",
        "GteNewModel",
        "JinaBertForMaskedLM",
        "JinaBertModel",
        "ModernBertModel",
        "MPNetModel",
        "NewModel",
        "NomicBertModel",
        "RobertaForMaskedLM",
        "RobertaModel",
        "SnowflakeGteNewModel",
        "XLMRobertaModel",
    }
)
# vLLM's derivation skips the factor for these; see _get_and_verify_max_len.
UNSCALED_ROPE = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default"})
BYTES_PER_ELEMENT = 4  # float32: a node's CPU may not compute in less
SAMPLE_BYTES = 2**20
# What sentence-transformers' own settings of a transformer are called, the first first.
SENTENCE_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")


def resolve_model_path(model_path: str) -> str:
    """Return the folder behind `package://PACKAGE/FOLDER`; any other path unchanged.

    Raises FileNotFoundError where the package isn't installed.
    """
    if not model_path.startswith(PACKAGE):
        return model_path
    package, _, folder = model_path.removeprefix(PACKAGE).partition("/")
    # find_spec of a top-level package doesn't import it.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the Python package `{package}` isn't installed")
    return str(Path(spec.submodule_search_locations[0], folder))


def content_id(folder: str | Path) -> str:
    """Return a short hash of a model folder's content, the same wherever the folder lies.

    Of a large file its size, beginning and end count: weights of gigabytes would take minutes to read. Hidden
    files and folders don't: they are a file manager's, a hub's or git's, and no part of the model.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(name.startswith(".") for name in file.relative_to(folder).parts):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLE_BYTES))
            content.seek(max(0, size - SAMPLE_BYTES))
            digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def is_hub_id(model_path: str) -> bool:
    """Say whether a path has the form of a model's id on a hub: `ORGANISATION/MODEL`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_path) is not None


def _number(config: dict[str, Any], *keys: str) -> int | None:
    """Return the first of the keys that holds a positive number; files of models hold the oddest things."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return int(value)
    return None


def _table(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return the first of the keys that holds a table, else an empty one."""
    return next((config[key] for key in keys if isinstance(config.get(key), dict)), {})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} doesn't hold a JSON object")
    return content


@dataclass(frozen=True)
class ModelFiles:
    """A model folder's `config.json` and what sentence-transformers puts beside it."""

    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    sentence_bert_config: dict[str, Any]
    sentence_transformers_config: dict[str, Any]
    folder: Path = Path()

    @classmethod
    def read(cls, folder: str | Path) -> "ModelFiles":
        """Read the folder. Raises FileNotFoundError or ValueError with one line that says why."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        inner = transformer_folder(folder)
        if not (inner / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}")
        settings = (inner / f"sentence_{kind}_config.json" for kind in SENTENCE_CONFIGS)
        try:
            return cls(
                config=_read(inner / "config.json"),
                tokenizer_config=_read(inner / "tokenizer_config.json"),
                sentence_bert_config=next(filter(None, map(_read, settings)), {}),
                sentence_transformers_config=_read(folder / "config_sentence_transformers.json"),
                folder=folder,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"a JSON file in {folder} is broken: {error}") from error
        except OSError as error:
            raise FileNotFoundError(f"a JSON file in {folder} can't be read: {error.strerror}") from error

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The text part of a multi-modal config, else the config itself."""
        return _table(self.config, "text_config") or self.config

    @property
    def architecture(self) -> str:
        """The first of `architectures`."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "unknown"

    @property
    def is_causal(self) -> bool:
        """Whether the checkpoint is a language model that has to be converted to embed."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))

    @property
    def supports_pipeline_parallel(self) -> bool:
        """Whether vLLM can spread the layers over stages."""
        return self.architecture not in NO_PIPELINE_PARALLEL

    @property
    def num_attention_heads(self) -> int | None:
        """Attention heads, which tensor parallelism divides."""
        return _number(self.text_config, "num_attention_heads", "n_head")

    @property
    def num_layers(self) -> int | None:
        """Layers, which pipeline parallelism divides."""
        return _number(self.text_config, "num_hidden_layers", "n_layer")

    @property
    def max_model_len(self) -> int | None:
        """The longest input in tokens, as vLLM derives it; None where the files don't say."""
        if length := _number(self.sentence_bert_config, "max_seq_length"):
            return length
        lengths = [length for key in LENGTH_KEYS if (length := _number(self.text_config, key))]
        if self.offset_positions and lengths:
            lengths[0] -= self.offset_positions
        if not lengths:
            return None
        rope = _table(self.text_config, "rope_scaling", "rope_parameters")
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaled = kind not in UNSCALED_ROPE and isinstance(rope.get("factor"), int | float)
        factor = float(rope["factor"]) if scaled else 1.0
        own = min(_number(self.tokenizer_config, "model_max_length") or lengths[0], *lengths)
        return int(own * factor)

    @property
    def offset_positions(self) -> int:
        """How many of its positions no token can have."""
        padding = self.text_config.get("pad_token_id", 1)
        is_offset = self.text_config.get("model_type") in OFFSET_POSITIONS and isinstance(padding, int)
        return padding + 1 if is_offset else 0

    @property
    def is_bare(self) -> bool:
        """Whether it names no modules: then sentence-transformers takes the mean of all tokens as it is."""
        return not modules_of(self.folder)

    @property
    def default_prompt(self) -> str:
        """The text put before each input for which nobody names a prompt."""
        return self.prompts.get(str(self.sentence_transformers_config.get("default_prompt_name")), "")

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are others than the model's by name and shape."""
        return "quantization_config" in self.config

    @property
    def truncates_start(self) -> bool:
        """Whether its tokenizer drops the start of what is too long."""
        return self.tokenizer_config.get("truncation_side") == "left"

    @property
    def normalizes(self) -> bool:
        """Whether its vectors have unit length."""
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules_of(self.folder)]
        return "Normalize" in kinds[-1:]

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The sizes of shorter vectors that it was trained for; every one where it says no more than that."""
        sizes = self.config.get("matryoshka_dimensions")
        if isinstance(sizes, list):
            return tuple(size for size in sizes if isinstance(size, int))
        size = _number(self.text_config, "hidden_size", "n_embd", "dim", "d_model")
        return tuple(range(1, size or 1)) if self.config.get("is_matryoshka") is True else ()

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a float32 key-value cache for one token, over all layers; 0 where unknown."""
        config = self.text_config
        heads, layers, size = self.num_attention_heads, self.num_layers, self.head_size
        if not (heads and layers and size):
            return 0
        kv_heads = _number(config, "num_key_value_heads") or heads
        return 2 * layers * kv_heads * size * BYTES_PER_ELEMENT

    @property
    def prompts(self) -> dict[str, str]:
        """The model's own prompts by use, as sentence-transformers saves them."""
        prompts = _table(self.sentence_transformers_config, "prompts")
        return {use: text for use, text in prompts.items() if isinstance(text, str)}

    @property
    def head_size(self) -> int | None:
        """The numbers of an attention head; None where the files don't say."""
        heads, hidden = self.num_attention_heads, _number(self.text_config, "hidden_size", "n_embd")
        return _number(self.text_config, "head_dim") or (hidden // heads if heads and hidden else None)

    def unfaithful(self, device: str | None) -> Iterator[str]:
        """Yield where vLLM's vectors would differ from the model's own; more on a `device` that is known."""
        return unfaithful(self.folder, self.text_config, self.head_size if device == "cpu" else None)

    def engine(self, wanted: str | None, device: str | None = None) -> tuple[str, str]:
        """Return the engine that serves it, and why: vLLM wherever that gives the model's own vectors."""
        if wanted is not None:
            return wanted, "as generator.engine says"
        reason = next(chain(self.unfaithful(device), unproven(self.text_config)), None)
        if reason is not None:
            return "sentence-transformers", reason
        return "vllm", "it gives the model's own vectors"

    def objections(
        self,
        max_model_len: int | None,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        engine: str | None = None,
        device: str | None = None,
    ) -> list[tuple[str, str]]:
        """Return (key, reason) for each setting that this model makes impossible."""
        reasons = list(broken(self.folder))
        if engine == "vllm":
            reasons += self.unfaithful(device)
        found = [("generator.model_path", reason) for reason in reasons]
        if self.engine(engine, device)[0] != "vllm":
            sizes = {"tensor": tensor_parallel_size, "pipeline": pipeline_parallel_size}
            what = "the engine sentence-transformers computes on one rank; use 1"
            found += [(f"generator.{key}_parallel_size", what) for key, size in sizes.items() if size > 1]
        longest, heads, layers = self.max_model_len, self.num_attention_heads, self.num_layers
        tensor, pipeline = "generator.tensor_parallel_size", "generator.pipeline_parallel_size"
        if max_model_len and longest and max_model_len > longest:
            found.append(("generator.max_model_len", f"{max_model_len} is above the model's own {longest}"))
        if heads and heads % tensor_parallel_size:
            found.append((tensor, f"{heads} attention heads can't be divided by {tensor_parallel_size}"))
        if pipeline_parallel_size > 1 and not self.supports_pipeline_parallel:
            what = f"{self.architecture} is an encoder, which can't run pipeline-parallel; use 1"
            found.append((pipeline, what))
        elif layers and pipeline_parallel_size > layers:
            found.append((pipeline, f"{pipeline_parallel_size} stages for {layers} layers"))
        return found
