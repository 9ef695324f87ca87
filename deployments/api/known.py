"""What each dialect knows of a request's fields: the one table.

A field is read, or it is known to change no vector and set aside; whatever else a body holds is refused by
its name. Nothing is ignored that may change a vector, whoever made it up, and a slip of the pen is told.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.errors import InvalidRequestError, MissingCapabilityError

# Who asks, how the answer is paid for, found again, cached or waited for: of OpenAI's API, of the gateways
# before it, and of vLLM's server. Their values are nobody's business here.
ASIDE = frozenset(
    (
        *("user", "hosting", "metadata", "store", "stream", "service_tier", "safety_identifier", "timeout"),
        *("prompt_cache_key", "request_id", "priority", "cache_salt"),
    )
)
CHAT = (
    "messages",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
# What other servers do, or models elsewhere, and nobody here can: a clearer word than that it isn't known.
MISSING = {
    **dict.fromkeys(CHAT, "no model here reads chat messages; send their text as `input`"),
    "late_chunking": "no model here chunks late",
    "task": "no model here has adapters; its prompts are chosen by `input_type`",
    "images": "no model here reads images",
    "modality": "models here read text alone",
}


@dataclass(frozen=True)
class Dialect:
    """The fields of a dialect's body: those that are `read`, and those that are set `aside`."""

    read: frozenset[str]
    aside: frozenset[str] = ASIDE

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raise InvalidRequestError or MissingCapabilityError for the first field that isn't known."""
        for name in fields:
            if name not in self.read and name not in self.aside:
                raise self._unknown(name)

    def _unknown(self, name: str) -> InvalidRequestError:
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        if name in MISSING:
            return MissingCapabilityError(f"`{name}`: {MISSING[name]}", name)
        near = difflib.get_close_matches(name[:LONGEST_NAME], sorted(self.read), 1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        return InvalidRequestError(
            f"`{shown}` isn't known here, and may change the vectors{meant}", shown or "body"
        )

    def describe(self, **more: Any) -> Callable[[dict[str, Any]], None]:
        """Return what completes a schema of the fields that are read, for the OpenAPI document."""

        def complete(schema: dict[str, Any]) -> None:
            for name in sorted(self.aside - schema["properties"].keys()):
                schema["properties"][name] = {"description": "Accepted and not used."}
            schema.update(additionalProperties={"type": "null"}, **more)

        return complete


LONGEST_NAME = 64
COMMON = frozenset(("model", "tags"))
PROMPT = frozenset(("input_type", "prompt_name"))
VLLM = frozenset(
    (
        *("truncate_prompt_tokens", "truncation_side", "add_special_tokens", "use_activation", "padding"),
        *("embed_dtype", "endianness"),
    )
)
OPENAI = Dialect(
    COMMON | PROMPT | VLLM | {"input", "encoding_format", "dimensions", "normalize", "normalized", "truncate"}
)
COHERE = Dialect(
    COMMON
    | {"texts", "inputs", "images", "input_type", "embedding_types", "truncate", "max_tokens"}
    | {"output_dimension"}
)
TEI = Dialect(
    COMMON | {"inputs", "normalize", "truncate", "truncation_direction", "prompt_name", "dimensions"},
    ASIDE | {"options"},  # of Hugging Face's hosted endpoints: whether to wait, and to cache
)
EMBED = COMMON | {"normalize", "contextual_control_threshold"}
PHARIA_ASIDE = ASIDE | {"control_log_additive"}
SEMANTIC = EMBED | {"representation", "compress_to_size"}
TOKENIZE = {"prompt", "add_special_tokens", "return_token_strs"}
VLLM_TOKENIZE, VLLM_DETOKENIZE = Dialect(COMMON | TOKENIZE), Dialect(COMMON | {"tokens"})
POOLING = Dialect(OPENAI.read | {"task"})
TEI_TOKENIZE = Dialect(COMMON | {"inputs", "add_special_tokens", "prompt_name"})
TEI_DECODE = Dialect(COMMON | {"ids", "skip_special_tokens"})
TEI_SIMILARITY = Dialect(COMMON | {"inputs", "parameters"})
TEI_PAIRS = Dialect(frozenset(("source_sentence", "sentences")), frozenset())
TEI_PARAMETERS = Dialect(frozenset(("truncate", "truncation_direction", "prompt_name")), frozenset())
PHARIA_TOKENIZE = Dialect(COMMON | {"prompt", "tokens", "token_ids"})
PHARIA_DETOKENIZE = Dialect(COMMON | {"token_ids"})
PHARIA_SEMANTIC = Dialect(SEMANTIC | {"prompt"}, PHARIA_ASIDE)
PHARIA_BATCH = Dialect(SEMANTIC | {"prompts"}, PHARIA_ASIDE)
PHARIA_INSTRUCTABLE = Dialect(EMBED | {"input", "instruction"}, PHARIA_ASIDE)
