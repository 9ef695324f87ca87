"""Pharia's formats as models, for the OpenAPI document."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.api.fields import Text, TokenId, TokenIds
from deployments.api.known import ASIDE, ModelBody

MAX_PROMPTS = 100


class Item(BaseModel):
    """A part of a prompt."""

    controls: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="No model here takes any."
    )


class TextItem(Item):
    """Text as a part of a prompt."""

    type: Literal["text"]
    data: str


class TokenIdsItem(Item):
    """Token ids as a part of a prompt."""

    type: Literal["token_ids"]
    data: TokenIds


NOT_ALL_EMPTY: dict[str, Any] = {"contains": {"properties": {"data": {"minLength": 1}}}}
TextPrompt = Text | Annotated[list[TextItem], Field(json_schema_extra=NOT_ALL_EMPTY)]
IdsPrompt = Annotated[list[TokenIdsItem], Field(min_length=1)]


class Embed(ModelBody):
    """What every body that embeds may hold."""

    aside = ASIDE | {"control_log_additive"}

    normalize: bool | None = Field(False, description="Ask for unit length from a model that gives others.")
    contextual_control_threshold: Literal[0] | None = Field(None, description="No model here supports it.")


class Semantic(Embed):
    """What both semantic bodies hold beside their prompts."""

    representation: Literal["symmetric", "document", "query"] = Field(
        description="Which of the model's prompts is put before the text; none where the model has none."
    )
    compress_to_size: Literal[128] | None = Field(None, description="Where the model allows 128 dimensions.")


class SemanticBody(Semantic):
    """The body of `POST /semantic_embed`."""

    model_config = ConfigDict(title="SemanticEmbeddingRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "prompt": "Hello", "representation": "document"}]
    }

    prompt: TextPrompt | IdsPrompt


class BatchSemanticBody(Semantic):
    """The body of `POST /batch_semantic_embed`."""

    model_config = ConfigDict(title="BatchSemanticEmbeddingRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "prompts": ["a", "b"], "representation": "symmetric"}]
    }

    prompts: (
        Annotated[list[TextPrompt], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[IdsPrompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class InstructableBody(Embed):
    """The body of `POST /instructable_embed`."""

    model_config = ConfigDict(title="InstructableEmbeddingRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "input": "Hello", "instruction": "Find greetings"}]
    }

    input: TextPrompt | IdsPrompt
    instruction: Text


class SemanticResponse(BaseModel):
    """The answer of `/semantic_embed` and `/instructable_embed`."""

    model_version: str
    embedding: list[float]
    num_tokens_prompt_total: int


class BatchSemanticResponse(BaseModel):
    """The answer of `/batch_semantic_embed`, in the order of the prompts."""

    model_version: str
    embeddings: list[list[float]]
    num_tokens_prompt_total: int


class TokenizeBody(ModelBody):
    """The body of `POST /tokenize`."""

    model_config = ConfigDict(title="TokenizationRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "prompt": "Hello", "tokens": True, "token_ids": True}]
    }

    prompt: str
    tokens: bool
    token_ids: bool


class TokenizeResponse(BaseModel):
    """What the model would read, special tokens included."""

    tokens: list[str] | None = None
    token_ids: list[int] | None = None


class DetokenizeBody(ModelBody):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(title="DetokenizationRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "token_ids": [101, 7592, 102]}]
    }

    token_ids: list[TokenId]


class DetokenizeResponse(BaseModel):
    """The text, without special tokens."""

    result: str


class ModelSettings(BaseModel):
    """A model as Pharia's clients list it."""

    name: str
    status: Literal["available", "unavailable"]
    worker_type: str
    description: str
    multimodal: bool
    max_context_size: int | None
    maximum_completion_tokens: int | None
    semantic_embedding: bool
    completion_type: str
    embedding_type: Literal["none", "semantic", "instructable"]
    chat: bool
    prompt_template: str | None
