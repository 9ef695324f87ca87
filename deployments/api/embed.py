"""`POST /embed`, which three dialects have: told apart by their bodies."""

from deployments.api import cohere, pharia, tei
from deployments.api import fields as read
from deployments.api.request import EmbeddingRequest
from deployments.errors import InvalidRequestError


def parse_request(body: read.Body) -> EmbeddingRequest:
    """Parse a body of Cohere's or text-embeddings-inference's; Pharia's asks for what vLLM can't do."""
    fields = read.read_object(body)
    if cohere.is_mine(fields):
        return cohere.parse_fields(fields)
    if tei.is_mine(fields):
        return tei.parse_fields(fields)
    if "prompt" in fields or "layers" in fields:
        pharia.refuse_raw(fields)
    raise InvalidRequestError("`texts` (Cohere) or `inputs` (text-embeddings-inference) is missing", "inputs")
