"""Chat messages → the text that a model was trained to read them as.

With what transformers gives to templates; its own renderer loads torch, and ingress replicas do without it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deployments.errors import InvalidRequestError, first_line

# What stands in a message's text, and beside it, to see which of them a chat template writes.
PROBE, BESIDE = "probed", "beside"
# Whose message a template may want: some write those of a query or a document alone, or a system's first.
ROLES = ("user", "query", "document", "system")
# A role that most templates leave out, with what it says: they know it as `system`.
DEVELOPER = "developer"
SYSTEM = (DEVELOPER, "system")
# Stands behind the text of a message that is gone on with; a template that strips messages takes its space.
END = "END_OF_THE_LAST_MESSAGE "


class _Generation(Extension):
    """Marks of what an assistant said, which those who train look for."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's chat template, compiled, in a sandbox."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any]) -> None:
        """Compile the template, and see in which form it reads texts. Raises TemplateError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(template)
        self._knows_developers = f'"{DEVELOPER}"' in template or f"'{DEVELOPER}'" in template
        self._special_tokens = dict(special_tokens)
        self._reads_parts = self._reads_strings = True  # while it is seen what it does with either
        strings, parts = self._writes(PROBE), self._writes([{"type": "text", "text": PROBE, BESIDE: BESIDE}])
        self._reads_strings, self._reads_parts = strings or not parts, parts

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the text of one conversation. Raises InvalidRequestError where the template doesn't take it.

        `variables` are the template's; with `continue_final_message` nothing stands behind the last message.
        """
        goes_on = variables.get("continue_final_message")
        given: dict[str, Any] = {"add_generation_prompt": False, "tools": None, "documents": None}
        if not self._knows_developers and any(message["role"] == DEVELOPER for message in messages):
            messages = _with_one_system(messages)
        read = [self._as_read(message) for message in messages]
        if goes_on:
            self._mark(read[-1])
        try:
            text = self._template.render({**self._special_tokens, **given, **variables, "messages": read})
        except Exception as error:  # it is a program, which ends as it likes with what it wasn't made for
            told = first_line(error)
            raise InvalidRequestError(f"the model's chat template doesn't take this: {told}") from error
        if not goes_on:
            return text
        if (end := text.rfind(END.strip())) < 0:
            raise InvalidRequestError("the model's chat template leaves the last message out")
        # Where the template strips messages, what it goes on with is stripped.
        return text[:end] if text[end:].startswith(END) else text[:end].rstrip()

    @staticmethod
    def _refuse(reason: str) -> None:
        raise TemplateError(reason)

    def _writes(self, content: Any) -> bool:
        """Whether what stands in a content's text is written, and nothing that stands beside it."""
        for role in ROLES:
            try:
                text = self.render([{"role": role, "content": content}], {})
            except InvalidRequestError:
                continue
            if PROBE in text:
                return BESIDE not in text
        return False

    def _as_read(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with its text in a form that the template reads."""
        content = message.get("content") or ""
        if isinstance(content, str):
            content = content if self._reads_strings else [{"type": "text", "text": content}]
        elif not self._reads_parts:
            content = _text_of(content)
        return {**message, "content": content}

    @staticmethod
    def _mark(message: dict[str, Any]) -> None:
        """Put a mark behind a message's text."""
        content = message["content"]
        if isinstance(content, str):
            message["content"] = content + END
        else:
            *before, last = content
            message["content"] = [*before, {**last, "text": last["text"] + END}]


def _with_one_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages with what developers and systems say as one, the first, as vLLM has it."""
    told = [each for each in messages if each["role"] in SYSTEM]
    others = [each for each in messages if each["role"] not in SYSTEM]
    texts = filter(None, (_text_of(each.get("content") or "") for each in told))
    return [{**told[0], "role": "system", "content": "\n\n".join(texts)}, *others]


def _text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
