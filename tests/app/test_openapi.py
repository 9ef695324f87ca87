"""The document and the application say the same: what is allowed, what is refused, what is answered."""

import ast
import asyncio
import contextlib
import copy
import functools
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import jsonschema_rs
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model
from starlette.requests import Request

from deployments import api
from deployments.api import batches, tei, vllm
from deployments.api.fields import read_object
from deployments.batches.routes import batch_routes
from deployments.batches.serving import DEFAULT_BATCHES, FORM_EXPIRY, MAX_BATCHES, MAX_FILES, BatchServing
from deployments.batches.serving import _expiry as batches_form
from deployments.batches.store import BatchPlace
from deployments.config.load import load_workers
from deployments.errors import EmbeddingError
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.http.documentation import document
from deployments.http.routes import EMBEDDING_ROUTES
from deployments.http.serving import lane_of
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.app.conftest import LocalHandle, make_serving
from tests.harness import workers
from tests.harness.server import free_port, program

# The name in the documentation's examples.
MODEL = "all-minilm-l6-v2"
SECRET = "secret-of-the-test"
# What a schema can't say makes some well-formed requests impossible: a model's sizes, prompts, vocabulary.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "429"]
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The application with keys on, served by uvicorn in a thread."""
    file = tmp_path / "model.toml"
    file.write_text(
        workers.fake(
            MODEL, "dimension = 16", task='dimensions = [8]\nprompts = {instruction = "{instruction}: "}'
        )
    )
    (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
    now = datetime.now(UTC)
    key = Key(name="test", sha256=hash_of(SECRET.encode()), created=now, operator=True)
    access = Access(KeyRing(Keys(keys=(key,))), LocalRates())
    port = free_port()

    def run() -> None:
        serving = make_serving({plan.name: LocalHandle(plan)}, access.rates)

        async def gather() -> list[bytes]:
            return [serving.metrics.text()]

        stored = BatchPlace(f"{tmp_path}/storage", 3600).open()
        # Whoever runs batches is another process.
        batches = batch_routes(BatchServing(stored, 1_000_000, lambda: None, serving))
        server.config.app = make_app(serving, gather, access=access, batches=batches)
        server.run()

    server = uvicorn.Server(uvicorn.Config("", port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.slow
def test_every_answer_is_a_documented_one(address: str, tmp_path: Path) -> None:
    """No 5xx, no undocumented status, no other shape; for well and ill formed requests, by all checks."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [program("schemathesis"), "--config-file", str(config), "run", f"{address}/openapi.json"]
    command += ["--checks", "all", "--max-examples", "5", "--seed", "1", "--workers", "1", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--header", f"Authorization: Bearer {SECRET}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr


def test_a_body_in_another_encoding_is_refused_as_documented(address: str, described: dict[str, Any]) -> None:
    """On every route that takes one, and the answer says which encodings are read."""
    told = {}
    for path, operations in described["paths"].items():
        if "requestBody" in operations.get("post", {}):
            assert "415" in operations["post"]["responses"], path
            form = "multipart/form-data" in operations["post"]["requestBody"]["content"]
            kind = "multipart/form-data; boundary=b" if form else "application/json"
            headers = {"x-api-key": SECRET, "content-encoding": "br", "content-type": kind}
            answer = httpx.post(f"{address}{path}", content=b"x", headers=headers, timeout=30)
            told[path] = answer.status_code, answer.headers.get("accept-encoding"), answer.json()["error"]
    error = {
        "message": "bodies may be encoded with gzip, deflate or zstd, once",
        "type": "invalid_request_error",
        "param": "content-encoding",
        "code": "unsupported_encoding",
    }
    assert told.keys() >= {"/v1/embeddings", "/v1/files", "/v1/batches", "/v1/tokenize"}
    assert told == dict.fromkeys(told, (415, "gzip, deflate, zstd", error))


# --- each body's schema, and what reads it --------------------------------------------------------

PARSERS: dict[str, Callable[[Mapping[str, Any]], object]] = {
    **{f"/v1{route.path}": route.parse for route in EMBEDDING_ROUTES},
    "/v1/tokenize": vllm.parse_tokenize,
    "/v1/detokenize": vllm.parse_detokenize,
    "/v1/decode": tei.parse_decode,
    "/v1/batches": batches.parse_create,
}
# JSON Schema calls 1.0 an integer. We don't, and no such number stands here.
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    2**64,
    "",
    "x",
    [],
    {},
    [1],
    ["x"],
    [None],
    [[]],
    [[1]],
    [{}],
]
ODD += [{"type": "text", "data": "x"}, {"type": "token_ids", "data": [1]}, {"type": "image", "data": "x"}]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of an application with all that there is."""
    stored = BatchPlace(str(tmp_path_factory.mktemp("storage")), 3600).open()
    access = Access(KeyRing(Keys()), LocalRates())

    async def get() -> dict[str, Any]:
        serving = make_serving({}, access.rates)
        batches = batch_routes(BatchServing(stored, 1_000_000, lambda: None, serving))
        app = make_app(serving, list, access=access, batches=batches)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cluster") as client:
            found: dict[str, Any] = (await client.get("/openapi.json")).json()
            return found

    return asyncio.run(get())


def bodies(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the document says of each JSON body, by path."""
    return {
        path: operation["requestBody"]["content"]["application/json"]
        for path, operations in described["paths"].items()
        for operation in operations.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }


def allows(schema: dict[str, Any], described: dict[str, Any]) -> Callable[[Any], bool]:
    """Return what tells whether a schema of the document allows a value."""
    return jsonschema_rs.validator_for({**schema, "components": described["components"]}).is_valid


def takes(parse: Callable[[Mapping[str, Any]], object], body: Any) -> bool:
    """Whether a parser takes a body."""
    try:
        parse(read_object(json.dumps(body).encode()))
    except EmbeddingError:
        return False
    return True


def near(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that are about what a schema says: most are allowed, and many lie at its limits."""
    return _mostly(_near(schema, components), st.sampled_from(ODD))


def _mostly(likely: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 24).flatmap(lambda n: likely if n else rare)


def _near(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:  # noqa: PLR0911
    if "$ref" in schema:
        return _near(components["schemas"][schema["$ref"].rpartition("/")[2]], components)
    if "anyOf" in schema:
        return st.one_of([near(each, components) for each in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "string":
            most = schema.get("maxLength", 3)
            return _mostly(st.sampled_from(["x", "é" * most]), st.sampled_from(["", "é" * (most + 1)]))
        case "integer":
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**64 - 1)
            return _mostly(st.sampled_from([low, low + 1, high]), st.sampled_from([low - 1, high + 1]))
        case "array":
            most = schema.get("maxItems", 3)
            items = st.lists(near(schema["items"], components), min_size=min(1, most), max_size=min(2, most))
            return _mostly(
                items, st.just([]) | items.map(lambda few: (few * (most + 1))[: most + len(few) % 2])
            )
        case "object":
            return _object(schema, components)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return st.sampled_from(ODD)


def _object(schema: dict[str, Any], components: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "properties" not in schema:  # names are free
        most, values = schema.get("maxProperties", 3), schema["additionalProperties"]
        values = near(values if isinstance(values, dict) else {}, components)
        names = _near({"type": "string", **schema.get("propertyNames", {})}, components)
        many = st.integers(most, most + 1).map(lambda n: {str(i): "" for i in range(n)})
        return st.dictionaries(names, values, max_size=2) | many
    known = {name: near(each, components) for name, each in schema["properties"].items()}
    needed = {name: known.pop(name) for name in schema.get("required", ())}
    whole = st.fixed_dictionaries(needed, optional=known)
    return _mostly(whole, whole.map(lambda body: dict(list(body.items())[1:])))


def test_every_body_has_its_parser(described: dict[str, Any]) -> None:
    """The tests below go through all of them."""
    assert set(bodies(described)) == set(PARSERS)


@pytest.mark.parametrize("path", PARSERS)
def test_document_and_parser_allow_the_same(described: dict[str, Any], path: str) -> None:
    """In both directions, for each body of each dialect; null counts as absent."""
    content, parse = bodies(described)[path], PARSERS[path]
    allowed = allows(content["schema"], described)

    @given(near(content["schema"], described["components"]))
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    def check(body: Any) -> None:
        assert takes(parse, body) == allowed(body), body

    for example in content["examples"].values():
        check.hypothesis.inner_test(example["value"])  # type: ignore[attr-defined]
        assert allowed(example["value"])
    check()


@functools.cache
def names_in_parsers() -> set[str]:
    """Return all that may be a field's name in the sources of our parsers; a sentence can't."""
    folder = Path(api.__file__).parent
    known = [node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    texts = {node.value for node in known if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.isidentifier()}


@pytest.mark.parametrize("path", PARSERS)
def test_no_field_is_read_that_the_document_doesnt_name(described: dict[str, Any], path: str) -> None:
    """Whatever name our parsers know, with whatever value, in whatever object of an example."""
    content, parse = bodies(described)[path], PARSERS[path]
    allowed = allows(content["schema"], described)
    names = names_in_parsers()
    for example in content["examples"].values():
        body = copy.deepcopy(example["value"])
        for each in objects(body):
            before = dict(each)
            for name, value in itertools.product(sorted(names), ODD):
                each[name] = value
                assert takes(parse, body) == allowed(body), body
                each.clear()
                each.update(before)


WRITTEN = ["", "true", "false", "True", "1", "0", "-1", "+1", "1.0", " 1", "1_0", "20", "100", "101", "10000"]
WRITTEN += ["10001", "01", "0000000011000000", "000000001" + "0" * 5000, "٣", "asc", "desc", "DESC", "x"]
QUERIES: dict[tuple[str, str], Callable[[dict[str, str]], object]] = {
    ("/v1/files", "get"): lambda query: batches.parse_page(query, MAX_FILES, MAX_FILES),
    ("/v1/batches", "get"): lambda query: batches.parse_page(query, DEFAULT_BATCHES, MAX_BATCHES),
    **{(f"/v1{route.path}", "post"): lambda query: lane_of(_request(query)) for route in EMBEDDING_ROUTES},
}


def _request(query: dict[str, str]) -> Request:
    return Request({"type": "http", "headers": [], "query_string": urlencode(query).encode()})


def test_document_and_routes_allow_the_same_queries(described: dict[str, Any]) -> None:
    """Each parameter, however it is written; numbers and booleans are written as in JSON."""
    asked = {
        (path, method): [each for each in operation["parameters"] if each["in"] == "query"]
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
        if any(each["in"] == "query" for each in operation.get("parameters", ()))
    }
    assert set(asked) == set(QUERIES)
    for where, parameters in asked.items():
        for parameter, text in itertools.product(parameters, WRITTEN):
            value = written(text, parameter["schema"])
            try:
                QUERIES[where]({parameter["name"]: text})
            except EmbeddingError as error:
                assert error.param == parameter["name"]
                taken = False
            else:
                taken = True
            assert taken == allows(parameter["schema"], described)(value), (where, parameter["name"], text)


def test_document_and_form_allow_the_same(described: dict[str, Any]) -> None:
    """How long a file is kept, which a form holds as text."""
    form = described["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    names = [f"{FORM_EXPIRY}[{name}]" for name in ("anchor", "seconds")]
    allowed = allows(form, described)
    texts = [None, "created_at", "3600", "3599", "2592000", "2592001", "03600", "٣٦٠٠", "3600.0", *WRITTEN]
    for pair in itertools.product(texts, repeat=2):
        fields = {name: text for name, text in zip(names, pair, strict=True) if text is not None}
        try:
            batches_form(fields)
            taken = True
        except EmbeddingError:
            taken = False
        values = {name: written(text, form["properties"][name]) for name, text in fields.items()}
        assert taken == allowed({"file": "x", "purpose": "batch", **values}), fields


def written(text: str, schema: dict[str, Any]) -> Any:
    """Return what a text of a query or a form means, where numbers and booleans are written as in JSON."""
    if schema["type"] != "string" and text == text.strip() and not text.endswith(".0"):
        with contextlib.suppress(json.JSONDecodeError, ValueError):
            return json.loads(text)
    return text


def test_routes_say_who_may_ask_them(described: dict[str, Any]) -> None:
    """401 stands with all but the public ones, and only the metrics are the operators'."""
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == ("security" not in operation), path
            codes = json.dumps(operation["responses"].get("403", ""))
            assert ("operator_only" in codes) == (path == "/v1/metrics"), path


@pytest.mark.parametrize("nested", [False, True])
def test_two_schemas_of_one_name_are_refused(nested: bool) -> None:
    """Else one of them would be documented with the other, or with its parts."""
    inner = create_model("Inner", number=int)
    first = create_model("Body", inner=inner)
    second = create_model("Other", inner=create_model("Inner", text=str)) if nested else create_model("Body")
    assert set(document(FastAPI(), [first, first])["components"]["schemas"]) == {"Body", "Inner"}
    with pytest.raises(ValueError, match="Inner" if nested else "Body"):
        document(FastAPI(), [first, second])


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a value."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(each)
