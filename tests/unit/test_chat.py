"""Chat messages, as transformers writes them: each kind of template, and what none of them takes."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deployments.engine.tokenizer.chat import ChatTemplate
from deployments.errors import InvalidRequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{% if thinking is defined %}{{ thinking | tojson }}{% endif %}
{%- endif %}
"""
ALTERNATING = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user, assistant, user') }}
    {% endif %}
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% else %}{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}{% endif %}
{% endfor %}"""
PARTS = """{% for message in messages %}{{ message.role }}: {% for part in message.content %}
{% if part.type == 'text' %}{{ part.text }}|{% endif %}{% endfor %}{% endfor %}"""
EITHER = """{% for message in messages %}{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}{% if loop.index > 2 %}{% break %}{% endif %}{{ part['text'] }}
{% endfor %}{% endif %}{% endfor %}{{ {'é': '<&'} | tojson(indent=1) }}"""
DATED = "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "alternating": ALTERNATING, "parts": PARTS, "either": EITHER, "dated": DATED}
USER: dict[str, Any] = {"role": "user", "content": " What is a café? "}
SAID: dict[str, Any] = {"role": "assistant", "content": "A place\nto sit."}


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose text is a list with one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"add_generation_prompt": True, "thinking": "é"}])
@pytest.mark.parametrize("messages", [[USER], [USER, SAID], [USER, SAID, USER]])
def test_text_is_what_transformers_writes(name: str, variables: Any, messages: list[Any]) -> None:
    """Whether a message's text comes as a string or in parts, and whichever the template reads."""
    template = TEMPLATES[name]
    read = [as_parts(message) for message in messages] if name == "parts" else messages
    (right,), _ = render_jinja_template(
        conversations=[read], chat_template=template, **SPECIAL | {"add_generation_prompt": False} | variables
    )
    ours = ChatTemplate(template, SPECIAL)
    assert ours.render(messages, variables) == right
    if name != "either":  # which writes parts in a way of its own
        assert ours.render([as_parts(message) for message in messages], variables) == right


def test_several_parts_are_lines_where_a_template_reads_strings() -> None:
    """As vLLM joins them; a template that reads parts gets them as they are."""
    parts = {"role": "user", "content": [{"type": "text", "text": text} for text in "abc"]}
    assert "\na\nb\nc<|im_end|>" in ChatTemplate(CHATML, SPECIAL).render([parts], {})
    assert ChatTemplate(PARTS, SPECIAL).render([parts], {}) == "user: a|b|c|"
    assert ChatTemplate(EITHER, SPECIAL).render([parts], {}).startswith("a\nb\n{")


@pytest.mark.parametrize("last", ["The answer is ", " The answer is"])
def test_a_last_message_is_gone_on_with(last: str) -> None:
    """Nothing that closes it stands behind, as transformers has it."""
    messages = [USER, {"role": "assistant", "content": last}]
    (right,), _ = render_jinja_template(
        conversations=[messages], chat_template=CHATML, continue_final_message=True, **SPECIAL
    )
    assert ChatTemplate(CHATML, SPECIAL).render(messages, {"continue_final_message": True}) == right


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (ALTERNATING, [SAID], "Roles must alternate: user, assistant, user"),
        ("{{ messages[3].content.x }}", [USER], "list object has no element 3"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", [USER], None),
        ("{{ 1 / 0 }}", [USER], "division by zero"),
    ],
)
def test_what_a_template_doesnt_take_is_told(template: str, messages: list[Any], told: str | None) -> None:
    """Its own reason, and never more than a line; it reaches nothing but what it was given."""
    with pytest.raises(InvalidRequestError) as refused:
        ChatTemplate(template, SPECIAL).render(messages, {})
    begin = "the model's chat template doesn't take this: "
    assert refused.value.message.startswith(begin)
    assert told is None or refused.value.message == begin + told


@pytest.mark.parametrize("role", ["query", "system"])
def test_a_template_that_wants_another_role_is_seen_to_read_parts(role: str) -> None:
    """Else its loop would go through a string's characters, and write none of them."""
    wanted = f"{{% if messages[0].role != '{role}' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{PARTS}"
    text = ChatTemplate(wanted, SPECIAL).render([{"role": role, "content": "hello"}], {})
    assert text == f"{role}: hello|"


def test_what_a_developer_says_is_the_systems() -> None:
    """As one with it, and first, where a template doesn't know the role, as in vLLM."""
    told = [{"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"}]
    as_system = ChatTemplate(CHATML, SPECIAL).render([{"role": "system", "content": "a\n\nb"}, USER], {})
    assert ChatTemplate(CHATML, SPECIAL).render(told, {}) == as_system
    knowing = CHATML + "{# 'developer' #}"
    assert "<|im_start|>developer\nb" in ChatTemplate(knowing, SPECIAL).render(told, {})
