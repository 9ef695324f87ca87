"""What each dialect knows of a request's fields: the base of all bodies.

A field is read, or it is known to change no vector and set aside; whatever else a body holds is refused by
its name. Nothing is ignored that may change a vector, whoever made it up, and a slip of the pen is told.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from deployments.api.fields import Text
from deployments.config.explain import did_you_mean
from deployments.errors import InvalidRequestError, MissingCapabilityError

# Who asks, how the answer is paid for, found again, cached or waited for: of OpenAI's API, of the gateways
# before it, and of vLLM's server. Their values are nobody's business here.
ASIDE = frozenset(
    (
        *("user", "hosting", "metadata", "store", "stream", "service_tier", "safety_identifier", "timeout"),
        *("prompt_cache_key", "request_id", "priority", "cache_salt"),
    )
)
TEMPLATE = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
# What other servers do, or models elsewhere, and nobody here can: a clearer word than that it isn't known.
MISSING = {
    "chat_template": "the model's own is used",
    **dict.fromkeys(TEMPLATE, "it goes with `messages`"),
    "tools": "models here read messages alone",
    **dict.fromkeys(("media_io_kwargs", "mm_processor_kwargs"), "models here read text alone"),
    "late_chunking": "no model here chunks late",
    "task": "no model here has adapters; its prompts are chosen by `input_type`",
    "images": "no model here reads images",
    "modality": "models here read text alone",
}

# How much of a name is shown.
LONGEST_NAME = 64


class DialectBody(BaseModel):
    """A body: its fields are read, and stand in the OpenAPI document; those that are `aside` change nothing.

    `described` is what else the document says of it.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema, body: body.complete(schema))

    aside: ClassVar[frozenset[str]] = ASIDE
    described: ClassVar[dict[str, Any]] = {}

    @classmethod
    def check(cls, fields: Mapping[str, Any]) -> None:
        """Raise InvalidRequestError or MissingCapabilityError for the first field that isn't known."""
        read, aside = cls.model_fields, cls.aside
        for name in fields:
            if name not in read and name not in aside:
                raise cls._unknown(name)

    @classmethod
    def _unknown(cls, name: str) -> InvalidRequestError:
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        if name in MISSING:
            return MissingCapabilityError(f"`{name}`: {MISSING[name]}", name)
        meant = did_you_mean(name[:LONGEST_NAME], sorted(cls.model_fields))
        return InvalidRequestError(
            f"`{shown}` isn't known here, and may change the vectors{meant}", shown or "body"
        )

    @classmethod
    def complete(cls, schema: dict[str, Any]) -> None:
        """Say in a schema of the fields that are read what else there may be."""
        for name in sorted(cls.aside - schema["properties"].keys()):
            schema["properties"][name] = {"description": "Accepted and not used."}
        schema.update(additionalProperties={"type": "null"}, **cls.described)


class ModelBody(DialectBody):
    """A body that asks a model. Fields that are null count as absent."""

    model: str | None = Field(
        None,
        description="One of the names that `GET /models` lists; may be left out where there is only one.",
    )
    tags: list[Text] | None = Field(None, description="Only a worker that has all of them may serve this.")
