"""What is open to anybody's browser: the OpenAPI document, the page that shows it, the page of the cluster.

None of them asks another host.
"""

import importlib.util
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from deployments.api.encoding import ErrorResponse
from deployments.dispatch.offload import INLINE, offload
from deployments.http.errors import json_response
from deployments.http.table import REFERENCE, Audience, Entry, audience_of
from deployments.page.assets import PAGE, WELCOME, asset

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
    open_paths = {route.path for route in shown if audience_of(route) is Audience.ANYBODY}
    for route in shown:
        _restore_examples(route, described["paths"][route.path_format])
    for path, operations in described["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which no route gives
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


def documentation_routes(app: FastAPI, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the document, of these entries' bodies too, its page and the page's parts."""
    bodies = dict.fromkeys(model for each in entries for model in each.bodies)
    folder = assets_folder()
    made: dict[str, bytes] = {}

    async def openapi_json(request: Request) -> Response:
        if "document" not in made:
            made["document"] = await offload(
                INLINE, lambda: orjson.dumps(document(app, (ErrorResponse, *bodies)))
            )
        return json_response(made["document"])

    async def docs(request: Request) -> Response:
        # Relative addresses: nothing that a client sends, its Host for one, stands in the page.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
            swagger_ui_parameters={"validatorUrl": None},  # else the page asks Swagger's own host
        )

    async def part(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return FileResponse(folder / name, media_type=ASSETS[name])

    handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/openapi.json": openapi_json,
        "/docs": docs,
    }
    handlers |= {f"/docs/{name}": part for name in ASSETS}
    for path, handler in handlers.items():
        yield Entry(path=path, handler=handler, access=Audience.ANYBODY, shown=False)


def page_routes() -> Iterator[Entry]:
    """Yield the page at `/ui` with its parts, and what leads to it from `/`."""

    async def welcome(request: Request) -> Response:
        return asset(WELCOME).answer(request)

    async def page(request: Request) -> Response:
        return asset(PAGE).answer(request)

    async def part(request: Request, name: str) -> Response:
        if not name:  # `/ui/`, where the page's own addresses would lead elsewhere
            return Response(status_code=307, headers={"location": "../ui"})
        return asset(name).answer(request)

    for path, handler in (("/", welcome), ("/ui", page), ("/ui/{name:path}", part)):
        yield Entry(path=path, handler=handler, access=Audience.ANYBODY, shown=False)


def assets_folder() -> Path:
    """Return where Swagger UI's files lie, which a package brings along."""
    spec = importlib.util.find_spec("swagger_ui_bundle")
    assert spec is not None
    assert spec.submodule_search_locations
    (script,) = Path(spec.submodule_search_locations[0], "vendor").glob("*/swagger-ui-bundle.js")
    return script.parent
