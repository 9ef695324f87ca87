"""Chat messages, as vLLM's server takes them: through the template of the model, or refused."""

import dataclasses
from typing import Any

import httpx
import pytest

from deployments.engine import ModelCard
from deployments.engine.fake import FakeEngine
from tests.app.test_servers import answer, refused, same
from tests.harness.fake import TOKENIZER

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}{{ tone }}{{ bos_token }}"""
ASK: dict[str, Any] = {"role": "user", "content": "x"}
SAID: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": "y"}]}
PATHS = ["/embeddings", "/pooling", "/invocations", "/tokenize"]


@pytest.fixture
def templated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the models a chat template."""
    start = FakeEngine.start

    def with_template(self: FakeEngine) -> ModelCard:
        special = {"bos_token": "<s>"}
        return dataclasses.replace(start(self), chat_template=TEMPLATE, special_tokens=special)

    monkeypatch.setattr(FakeEngine, "start", with_template)


@pytest.mark.usefixtures("templated")
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "user: x;assistant: y;<s>"),
        ({"add_generation_prompt": True}, "user: x;assistant: y;assistant: <s>"),
        ({"continue_final_message": True}, "user: x;assistant: y"),
        ({"chat_template_kwargs": {"tone": "kind"}, "user": "me"}, "user: x;assistant: y;kind<s>"),
    ],
)
async def test_a_conversation_is_one_input(client: httpx.AsyncClient, fields: Any, text: str) -> None:
    """Under `messages` or as `input`; several of them are as many inputs."""
    one, other = [ASK, SAID], [ASK]
    for named in ("messages", "input"):
        got = await answer(client, "/embeddings", model="a", **{named: one}, **fields)
        assert same([each["embedding"] for each in got["data"]], [text])
        assert got["usage"]["prompt_tokens"] == len(TOKENIZER.encode([text])[0])
        got = await answer(client, "/embeddings", model="a", **{named: [other, one]}, **fields)
        assert same([got["data"][1]["embedding"]], [text])
    got = await answer(client, "/pooling", model="a", messages=one, **fields)
    assert same([got["data"][0]["data"]], [text])
    got = await answer(client, "/invocations", model="a", messages=one, **fields)
    assert same([got["data"][0]["embedding"]], [text])


@pytest.mark.usefixtures("templated")
@pytest.mark.parametrize(
    "part",
    [
        "y",
        {"type": "input_text", "text": "y"},
        {"type": "output_text", "text": "y", "annotations": []},
        {"type": "refusal", "refusal": "y"},
        {"type": "thinking", "thinking": "y"},
    ],
)
async def test_parts_that_are_text_are_read_as_text(client: httpx.AsyncClient, part: Any) -> None:
    """As vLLM takes them; a message that calls no tools may say so."""
    message = {"role": "user", "content": [part], "tool_calls": []}
    got = await answer(client, "/tokenize", model="a", messages=[message], add_generation_prompt=False)
    assert got["tokens"] == TOKENIZER.encode(["user: y;<s>"])[0]


@pytest.mark.usefixtures("templated")
async def test_tokens_of_a_conversation(client: httpx.AsyncClient) -> None:
    """With the beginning of an answer behind it, where the request doesn't say, as vLLM has it."""
    for fields, text in (
        ({}, "user: x;assistant: <s>"),
        ({"add_generation_prompt": False}, "user: x;<s>"),
        ({"continue_final_message": True}, "user: x"),
    ):
        got = await answer(client, "/tokenize", model="a", messages=[ASK], **fields)
        assert got["tokens"] == TOKENIZER.encode([text])[0]
    told = "`messages` must be one conversation here"
    assert (await refused(client, "/tokenize", model="a", messages=[[ASK]]))[1:] == ("messages", told)


@pytest.mark.parametrize("path", PATHS)
async def test_a_model_without_a_template_refuses_messages(client: httpx.AsyncClient, path: str) -> None:
    """Nobody has one of his own for it."""
    told = "the model has no chat template; send text as `input`"
    assert await refused(client, path, model="a", messages=[ASK]) == ("MISSING_CAPABILITY", "messages", told)


@pytest.mark.usefixtures("templated")
@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "`messages` must not be empty"),
        ({"messages": "x"}, "messages", "`messages` must be a list"),
        ({"messages": [[ASK], []]}, "messages", "`messages[1]` must be a list of messages that isn't empty"),
        ({"messages": [ASK, "x"]}, "messages", "`messages[1]` must be a message, which has a `role`"),
        ({"input": [{"content": "x"}]}, "input", "`input[0]` must be a message, which has a `role`"),
        (
            {"messages": [{**ASK, "content": 3}]},
            "messages",
            "`messages[0].content` must be a string or a list of parts",
        ),
        (
            {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "`messages[0].content` may hold parts of type `text` alone; models here read text",
        ),
        ({"messages": [ASK], "input": "x"}, "messages", "send `messages` or `input`, and not both"),
        ({"input": "x", "add_generation_prompt": True}, "add_generation_prompt", None),
        (
            {"messages": [ASK], "chat_template_kwargs": "x"},
            "chat_template_kwargs",
            "`chat_template_kwargs` must be an object",
        ),
        (
            {"messages": [ASK], "chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs",
            "`chat_template_kwargs` can't hold `chat_template`",
        ),
        (
            {"messages": [{**ASK, "tool_calls": [{}]}]},
            "messages",
            "`messages[0]` can't hold `tool_calls`; models read text",
        ),
        (
            {"messages": [[ASK]] * 2000, "chat_template_kwargs": {"tone": "x" * 9000}},
            "messages",
            "the chat template writes more than 9600000 characters",
        ),
        (
            {"messages": [ASK], "chat_template": "x"},
            "chat_template",
            "`chat_template`: the model's own is used",
        ),
        (
            {"messages": [ASK], "prompt_name": "query"},
            "prompt_name",
            "`prompt_name` isn't known here, and may change the vectors",
        ),
        (
            {"messages": [ASK], "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` can't both be true",
        ),
        (
            {"messages": [ASK], "chat_template_kwargs": {"tone": "\U0001f600" * 600}},
            "messages",
            f"`messages[0]` has {4 * 600 + 11} tokens, and the model takes 512",
        ),
    ],
)
async def test_what_is_no_conversation_is_refused_by_name(
    client: httpx.AsyncClient, fields: Any, param: str, told: str | None
) -> None:
    """Where it stands, and what is wrong with it."""
    told = told or f"`{param}`: it goes with `messages`"
    assert (await refused(client, "/embeddings", model="a", **fields))[1:] == (param, told)
