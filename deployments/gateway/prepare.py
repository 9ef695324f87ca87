"""A parsed request + a started model → the token batch, or the client's mistake by field.

prompt → tokenise → truncate → count
"""

import asyncio

from deployments.api.openai import EmbeddingRequest
from deployments.config.worker import EmbeddingTask, Limits
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    ContextLengthError,
    InvalidRequestError,
    MissingCapabilityError,
    TooManyInputsError,
)

# Below this many characters tokenising takes less than the hop to another thread and back.
INLINE_CHARACTERS = 20_000


async def prepare(
    request: EmbeddingRequest,
    task: EmbeddingTask,
    limits: Limits,
    card: ModelCard,
    tokenizer: TextTokenizer,
) -> TokenBatch:
    """Return the token ids of every input, in order, each no longer than the model takes."""
    if len(request) > limits.max_inputs:
        raise TooManyInputsError(
            f"{len(request)} inputs are more than the {limits.max_inputs} of one request", "input"
        )
    _check_dimensions(request.dimensions, task, card)
    if request.texts:
        inputs = await _tokenise(request, task, card, tokenizer)
    else:
        inputs = _check_token_ids(request, task, card)
    longest = card.max_model_len
    if request.truncate_prompt_tokens is not None or task.truncation != "none":
        longest = min(longest, request.truncate_prompt_tokens or longest)
        inputs = [
            tokenizer.truncate(ids, longest, task.truncation == "start", bool(request.texts))
            if len(ids) > longest
            else ids
            for ids in inputs
        ]
    _check_lengths(inputs, longest, limits)
    return TokenBatch.of(inputs)


async def _tokenise(
    request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard, tokenizer: TextTokenizer
) -> list[list[int]]:
    texts = request.texts
    if request.use is not None:
        prompts = card.prompts | task.prompts
        if request.use not in prompts:
            known = f"it has {', '.join(sorted(prompts))}" if prompts else "it has none"
            raise MissingCapabilityError(f"the model has no prompt of that name; {known}", request.use_field)
        texts = [prompts[request.use] + text for text in texts]
    if sum(map(len, texts)) < INLINE_CHARACTERS:
        return tokenizer.encode(texts)
    return await asyncio.to_thread(tokenizer.encode, texts)


def _check_token_ids(request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard) -> list[list[int]]:
    if task.token_input == "reject":
        raise MissingCapabilityError("this model takes texts only, no token ids", "input")
    if request.use is not None:
        raise InvalidRequestError("a prompt can't be put before token ids; send text", request.use_field)
    for index, ids in enumerate(request.token_ids):
        if max(ids) >= card.vocab_size:
            raise InvalidRequestError(
                f"`input[{index}]` holds a token id beyond the vocabulary of {card.vocab_size}", "input"
            )
    return [list(ids) for ids in request.token_ids]


def _check_lengths(inputs: list[list[int]], longest: int, limits: Limits) -> None:
    total = 0
    for index, ids in enumerate(inputs):
        total += len(ids)
        if not ids:
            raise InvalidRequestError(f"`input[{index}]` holds nothing that the model can read", "input")
        if len(ids) > longest:
            raise ContextLengthError(
                f"`input[{index}]` has {len(ids)} tokens, and the model takes {longest}", "input"
            )
    if total > limits.max_request_tokens:
        raise ContextLengthError(
            f"{total} tokens are more than the {limits.max_request_tokens} of one request", "input"
        )


def _check_dimensions(dimensions: int | None, task: EmbeddingTask, card: ModelCard) -> None:
    sizes = sorted({*(size for size in task.dimensions if size < card.dimension), card.dimension})
    if dimensions is None or dimensions in sizes:
        return
    raise InvalidRequestError(
        f"`dimensions` can't be {dimensions}; this model gives {', '.join(map(str, sizes))}",
        "dimensions",
    )
