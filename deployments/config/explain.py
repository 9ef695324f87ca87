"""What pydantic finds in a worker file, in our words: file, key, reason, and what was meant."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from deployments.config.worker import Model, Worker

Location = tuple[str, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake: where it is and what is wrong with it."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        """Return `file: key: message`."""
        return f"{self.file}: {self.key}: {self.message}" if self.key else f"{self.file}: {self.message}"


def explain(file: str, content: dict[str, Any], detail: Any) -> Problem:
    """Return what pydantic found, with the file and the key."""
    location: Location = tuple(str(part) for part in detail["loc"])
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        hint = did_you_mean(location[-1], fields_at(location[:-1]))
        name = None if hint else _dotted_name(content, location)
        message = "unknown key" + hint
        if name:
            quoted = f'[queue.models."{name}"]'
            message = f"a name with dots must be quoted: write {quoted}"
            location = location[:3]
    elif kind == "missing":
        message = "is missing"
    elif kind == "literal_error":
        expected = detail["ctx"]["expected"]
        shown = detail["input"] if isinstance(detail["input"], str | int) else "this"
        message = f"must be {expected}, not {shown!r}"
    elif kind == "string_pattern_mismatch":
        message = f"{detail['input']!r} doesn't have the form {detail['ctx']['pattern']}"
    return Problem(file, dotted(location), message)


def dotted(location: Location) -> str:
    """Return a key as a worker file would name it."""
    return ".".join(f'"{part}"' if "." in part else part for part in location)


def _dotted_name(content: dict[str, Any], location: Location) -> str | None:
    """Return the name that `[queue.models.a.b]` was meant to be, if that is the mistake here."""
    if location[:2] != ("queue", "models") or len(location) != 4:
        return None
    name = [location[2]]
    table: Any = content["queue"]["models"][location[2]]
    for part in _until_model(table, location[3]):
        name.append(part)
    return ".".join(name) if len(name) > 1 else None


def _until_model(table: Any, part: str) -> Iterator[str]:
    """Follow single nested tables down to the one that looks like a model's."""
    while isinstance(table, dict) and isinstance(table.get(part), dict):
        yield part
        table = table[part]
        if set(table) & set(Model.model_fields) or len(table) != 1:
            return
        part = next(iter(table))


def fields_at(location: Location) -> list[str]:
    """Return the keys that the schema knows in the table at `location`."""
    table = table_at(location)
    return list(table.model_fields) if table else []


def table_at(location: Location) -> type[BaseModel] | None:
    """Return the schema of the table at `location`, if there is one."""
    table: type[BaseModel] = Worker
    parts = iter(location)
    for part in parts:
        field = table.model_fields.get(part)
        annotation: Any = field.annotation if field else None
        inner = [
            each
            for each in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(each, type) and issubclass(each, BaseModel)
        ]
        if not inner:
            return None
        table = inner[0]
        if part == "models":
            next(parts, None)  # the model's name, which is free
    return table


def did_you_mean(word: str, known: Iterator[str] | list[str]) -> str:
    """Return a hint at the known word that is closest; nothing where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
