"""Chat messages in vLLM's form: a conversation, or a list of those, in `messages` or as the input."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.api import fields as read
from deployments.api.fields import Text
from deployments.api.known import ModelBody
from deployments.api.request import Chat
from deployments.errors import InvalidRequestError

# No variables of a template: vLLM refuses them too.
RESERVED = ("chat_template", "tokenize", "messages")
# The types of parts that vLLM takes for texts, and where each has its own.
TEXTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
    "thinking": "thinking",
}
EITHER = ["add_generation_prompt", "continue_final_message"]


def holds_messages(fields: read.Fields, instead: str) -> bool:
    """Whether a body has `messages`, or has them in the field that may hold them `instead`."""
    value = fields.get(instead)
    first = value[0] if isinstance(value, list) and value else None
    return "messages" in fields or isinstance(first[0] if isinstance(first, list) and first else first, dict)


def parse_chat(fields: read.Fields, instead: str, generates: bool = False) -> Chat:
    """Return the conversations of a body that `holds_messages`, and what it says to the chat template.

    That `generates` the beginning of an answer where the body doesn't say. Raises InvalidRequestError.
    """
    field = "messages" if "messages" in fields else instead
    if field != instead and instead in fields:
        raise InvalidRequestError(f"send `messages` or `{instead}`, and not both", field)
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise InvalidRequestError("`chat_template_kwargs` must be an object", "chat_template_kwargs")
    if name := next((name for name in RESERVED if name in variables), None):
        raise InvalidRequestError(f"`chat_template_kwargs` can't hold `{name}`", "chat_template_kwargs")
    goes_on = read.flag(fields, "continue_final_message") is True
    begins = read.flag(fields, "add_generation_prompt")
    if begins and goes_on:
        raise InvalidRequestError(
            "`continue_final_message` and `add_generation_prompt` can't both be true",
            "continue_final_message",
        )
    begins = generates and not goes_on if begins is None else begins
    options = {"add_generation_prompt": begins, "continue_final_message": goes_on}
    return Chat(_conversations(fields[field], field), {**variables, **options}, field)


def _conversations(value: Any, name: str) -> list[list[dict[str, Any]]]:
    if not isinstance(read.not_empty(value, name)[0], list):
        return [_messages(value, name, name)]
    return [_messages(messages, f"{name}[{index}]", name) for index, messages in enumerate(value)]


def _messages(value: Any, name: str, param: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"`{name}` must be a list of messages that isn't empty", param)
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise InvalidRequestError(f"`{name}[{index}]` must be a message, which has a `role`", param)
        if message.get("tool_calls") not in (None, []):
            raise InvalidRequestError(f"`{name}[{index}]` can't hold `tool_calls`; models read text", param)
        content = message.get("content", "")
        if not isinstance(content, str | list | None):
            raise InvalidRequestError(f"`{name}[{index}].content` must be a string or a list of parts", param)
        if isinstance(content, list) and None in map(_text_of, content):
            raise InvalidRequestError(
                f"`{name}[{index}].content` may hold parts of type `text` alone; models here read text", param
            )
    return [_plain(message) for message in value]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose parts are all of type `text`, as templates know them."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [{"type": "text", "text": _text_of(part)} for part in content]}


def _text_of(part: Any) -> str | None:
    """Return the text of a part, None where it has none."""
    if isinstance(part, dict):
        part = part.get(TEXTS.get(str(part.get("type")), ""))
    return part if isinstance(part, str) else None


# --- the same format as models, for the OpenAPI document only --------------------------------------


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "input_text", "output_text"]
    text: str


class Refusal(BaseModel):
    """A part of what a model said."""

    model_config = ConfigDict(extra="allow")

    type: Literal["refusal"]
    refusal: str


class Thinking(BaseModel):
    """A part of what a model thought."""

    model_config = ConfigDict(extra="allow")

    type: Literal["thinking"]
    thinking: str


class Message(BaseModel):
    """A message; whatever else stands in it is the chat template's."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: str | list[str | Part | Refusal | Thinking] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


def either(*names: str) -> list[dict[str, Any]]:
    """Return the schemas of bodies that hold one of these fields, and none of the others."""
    null = {"type": "null"}
    return [
        {"required": [name], "properties": {each: {"not": null} if each == name else null for each in names}}
        for name in names
    ]


Messages = Annotated[list[Message], Field(min_length=1)]
Conversations = Messages | Annotated[list[Messages], Field(min_length=1)]


class ChatBody(ModelBody):
    """What a body with messages says to the model's chat template."""

    described: ClassVar[dict[str, Any]] = {
        "examples": [{"messages": [{"role": "user", "content": "Hello"}]}],
        "not": {"properties": {name: {"const": True} for name in EITHER}, "required": EITHER},
    }

    add_generation_prompt: bool | None = Field(None, description="Begin an answer behind the last message.")
    continue_final_message: bool | None = Field(
        False, description="End with the last message's text: nothing that closes it follows."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Variables of the template.",
        json_schema_extra={"propertyNames": {"not": {"enum": list(RESERVED)}}},
    )
    add_special_tokens: bool | None = Field(False, description="The model's own, around what was written.")
