"""What text-embeddings-inference's clients ask of a model before they send texts."""

import asyncio
from importlib import metadata

from fastapi import Request, Response

from deployments.errors import InvalidKeyError, InvalidRequestError, ModelNotFoundError, ModelUnavailableError
from deployments.http.dialects.pharia import model_of
from deployments.http.errors import as_json
from deployments.http.serving import Serving
from deployments.http.table import Entry, answers
from deployments.machine import cores_here

# Requests that one ingress replica holds at a time; each costs a body and a coroutine.
MAX_INGRESS_REQUESTS = 4096
INFO = {
    "model_id": "all-minilm-l6-v2",
    "model_sha": None,
    "model_dtype": "float32",
    "model_type": {"embedding": {"pooling": "mean"}},
    "max_concurrent_requests": MAX_INGRESS_REQUESTS,
    "max_input_length": 256,
    "max_batch_tokens": 300_000,
    "max_batch_requests": 2048,
    "max_client_batch_size": 2048,
    "auto_truncate": False,
    "tokenization_workers": 2,
    "version": "0.1.0",
    "sha": None,
    "docker_label": None,
}


def info_route(serving: Serving) -> Entry:
    """Return the route that tells of a model."""

    async def info(request: Request) -> Response:
        arrival = asyncio.get_running_loop().time()
        served = serving.find(request, request.query_params.get("model"))
        card, _ = await model_of(served, request, arrival)
        limits, task = served.dispatch.worker.limits, served.model.embedding_task
        told = {
            "model_id": served.name,
            "model_dtype": card.dtype,
            "model_type": {"embedding": {"pooling": card.pooling}},
            "max_input_length": card.max_model_len,
            "max_batch_tokens": limits.max_request_tokens,
            "max_batch_requests": limits.max_inputs,
            "max_client_batch_size": limits.max_inputs,
            "auto_truncate": task.truncation != "none",
            "tokenization_workers": cores_here(),
            "version": metadata.version("embedding-cluster"),
        }
        return as_json(INFO | told)

    kinds = (InvalidKeyError, InvalidRequestError, ModelNotFoundError, ModelUnavailableError)
    return Entry(
        path="/info",
        handler=info,
        summary="Tell of a model and its limits; `?model=` names it where there are several (TEI).",
        responses=answers(INFO, *kinds),
    )
