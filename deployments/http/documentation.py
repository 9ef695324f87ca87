"""The OpenAPI document, and the page that shows it without asking another host."""

import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from deployments import errors
from deployments.api.encoding import ErrorResponse, error_body
from deployments.dispatch.offload import INLINE, offload
from deployments.http.access import Audience, audience_of, public

REFERENCE = "#/components/schemas/{model}"
Kinds = tuple[type[errors.EmbeddingError], ...]
# What a request with a body may be answered, whatever it asks for.
BODY: Kinds = (
    errors.InvalidKeyError,
    errors.ModelNotAllowedError,
    errors.RateLimitError,
    errors.InvalidRequestError,
    errors.MissingCapabilityError,
    errors.ModelNotFoundError,
    errors.DeadlineExceededError,
    errors.BodyTooLargeError,
    errors.ModelUnavailableError,
    errors.EmbeddingError,
)
EMBEDDING: Kinds = (
    *BODY,
    errors.ContextLengthError,
    errors.TooManyInputsError,
    errors.QueueFullError,
    errors.NonFiniteEmbeddingError,
)
# The parts of the documentation's page, and what they are.
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
# Any one of them, where the cluster has keys.
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
NICE = {
    "name": "nice",
    "in": "query",
    "description": "Let requests of people who wait go first.",
    "schema": {"type": "boolean", "default": False},
}


def answers(example: Any, *kinds: type[errors.EmbeddingError], model: Any = None) -> dict[int | str, Any]:
    """Return a route's `responses`: the answer with an example, and each kind of error with one."""
    ok: dict[str, Any] = {"content": {"application/json": {"example": example}}}
    if model is not None:
        ok["model"] = model
    found: dict[int | str, Any] = {200: ok}
    for kind in kinds:
        status = int(kind.status)
        shown = found.setdefault(
            status,
            {
                "model": ErrorResponse,
                "description": kind.status.phrase if hasattr(kind.status, "phrase") else "",
                "content": {"application/json": {"examples": {}}},
            },
        )
        message = (kind.__doc__ or "").splitlines()[0]
        examples = shown["content"]["application/json"]["examples"]
        examples[kind.code] = {"summary": message, "value": orjson.loads(error_body(kind(message)))}
    return found


def plain(example: str) -> dict[int | str, Any]:
    """Return a route's `responses` for an answer in plain text."""
    return {200: {"content": {"text/plain": {"example": example, "schema": {"type": "string"}}}}}


def body(*models: type[BaseModel], nice: bool = False) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a body that is one of the models."""
    schemas = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    examples = {
        str(number): {"summary": model.__doc__, "value": example}
        for number, (model, example) in enumerate(
            (model, example) for model in models for example in _examples(model)
        )
    }
    content = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}, "examples": examples}
    described: dict[str, Any] = {
        "requestBody": {"required": True, "content": {"application/json": content}},
    }
    if nice:
        described["parameters"] = [NICE]
    return described


def _examples(model: type[BaseModel]) -> list[Any]:
    examples: list[Any] = model.model_json_schema().get("examples", [])
    return examples


def document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Return the OpenAPI document with the schemas of `bodies`, which the routes read by hand.

    Raises ValueError where two schemas have one name.
    """
    described: dict[str, Any] = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    for model in bodies:
        schema = model.model_json_schema(ref_template=REFERENCE)
        for name, each in {**schema.pop("$defs", {}), model.__name__: schema}.items():
            if schemas.setdefault(name, each) != each:
                raise ValueError(f"two schemas are named {name}")
    shown = [route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    open_paths = {route.path for route in shown if audience_of(route.endpoint) is Audience.ANYBODY}
    for route in shown:
        _restore_examples(route, described["paths"][route.path_format])
    for path, operations in described["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which no route gives
            for response in operation["responses"].values():
                _errors_are_json(response["content"])
            if path in open_paths:
                operation["security"] = []
    described["components"]["securitySchemes"] = SECURITY
    described["security"] = [{name: []} for name in SECURITY]
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    return described


def _restore_examples(route: APIRoute, operations: dict[str, Any]) -> None:
    """Put a route's examples in as they are: FastAPI takes the nulls out of them, which answers have."""
    for method in route.methods:
        responses = operations[method.lower()]["responses"]
        for status, response in route.responses.items():
            for kind, content in response.get("content", {}).items():
                examples = {name: value for name, value in content.items() if name.startswith("example")}
                responses[str(status)]["content"][kind].update(examples)


def _errors_are_json(content: dict[str, Any]) -> None:
    """FastAPI puts an error's schema under the type of the route's answer; ours are JSON on every route."""
    if len(content) > 1:
        json, other = content["application/json"], content.pop("text/plain")
        json["schema"] = other["schema"]


def add_documentation(app: FastAPI, router: APIRouter, bodies: Sequence[type[BaseModel]]) -> None:
    """Add the document, its page and the page's parts to the routes."""
    folder = assets_folder()
    made: dict[str, bytes] = {}

    @public
    async def openapi_json() -> Response:
        if "document" not in made:
            made["document"] = await offload(INLINE, lambda: orjson.dumps(document(app, bodies)))
        return Response(made["document"], media_type="application/json")

    @public
    async def docs() -> Response:
        # Relative addresses: nothing that a client sends, its Host for one, stands in the page.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
            swagger_ui_parameters={"validatorUrl": None},  # else the page asks Swagger's own host
        )

    def asset(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
        @public
        async def send() -> Response:
            return FileResponse(folder / name, media_type=kind)

        return send

    router.add_api_route("/openapi.json", openapi_json, include_in_schema=False)
    router.add_api_route("/docs", docs, include_in_schema=False)
    for name, kind in ASSETS.items():
        router.add_api_route(f"/docs/{name}", asset(name, kind), include_in_schema=False)


def assets_folder() -> Path:
    """Return where Swagger UI's files lie, which a package brings along."""
    spec = importlib.util.find_spec("swagger_ui_bundle")
    assert spec is not None
    assert spec.submodule_search_locations
    (script,) = Path(spec.submodule_search_locations[0], "vendor").glob("*/swagger-ui-bundle.js")
    return script.parent
