"""A parsed request + a started model → the token batch, or the client's mistake by field.

prompt → tokenise → truncate → count
"""

import functools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from deployments.api.request import LONGEST, Chat, EmbeddingRequest, Prompt
from deployments.config.worker import EmbeddingTask, Limits
from deployments.dispatch.offload import offload
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    ContextLengthError,
    InvalidRequestError,
    MissingCapabilityError,
    TooManyInputsError,
)

# So much is tokenised at a time, at half a KiB for each token before they are cut or counted. A longer text
# has no place in a model of up to 31,000 tokens.
GROUP_CHARACTERS = 1_000_000
CHARACTERS_PER_TOKEN = 32
# So many numbers an answer with the vectors of tokens may have, each of some ten bytes.
MOST_NUMBERS = 8_000_000
# Returns the token ids of each text.
Encode = Callable[[Sequence[str]], list[list[int]]]
# The prompt that an instruction is put into, and where in it.
INSTRUCTION = "instruction"
PLACE = "{instruction}"
# How models that take instructions write theirs down: the E5 and Qwen3 families.
INSTRUCT_PROMPT = re.compile(r"(Instruct: ).*(\nQuery: ?)", re.DOTALL)


@dataclass(frozen=True)
class Prepared:
    """Token ids of every input, in order, and the indices of those that were cut.

    `by_token` says that the vectors of tokens are asked for.
    """

    batch: TokenBatch
    truncated: tuple[int, ...] = ()
    by_token: bool = False


async def prepare(
    request: EmbeddingRequest,
    task: EmbeddingTask,
    limits: Limits,
    card: ModelCard,
    tokenizer: TextTokenizer,
) -> Prepared:
    """Return the token ids of every input, each no longer than the model takes."""
    field = request.input_field
    if len(request) > limits.max_inputs:
        raise TooManyInputsError(
            f"{len(request)} inputs are more than the {limits.max_inputs} of one request", field
        )
    _check_vectors(request, task, card)
    sent = sum(map(len, request.token_ids))
    texts = await _texts_of(request, task, limits, card, tokenizer)
    inputs: list[list[int]] = []
    truncated: list[int] = []
    total = 0
    prompt = _prompt_of(request, task, card) if texts else ""
    if texts:
        encode = functools.partial(tokenizer.encode, special=request.special_tokens)
        groups = _tokenise([prompt + text for text in texts] if prompt else texts, encode, card, field)
    else:
        groups = _as_group(await offload(sent, _check_token_ids, request, task, card))
    cut = functools.partial(tokenizer.truncate, framed=bool(texts) and request.special_tokens)
    async for group in groups:
        kept, longest, which = _truncate(group, request, task, card, cut)
        total = _check_lengths(kept, len(inputs), total, longest, limits, field)
        truncated += [len(inputs) + index for index in which]
        inputs += kept
    batch = await offload(total, TokenBatch.of, inputs)
    _check_vocabulary(batch, card.vocab_size, field)
    if request.by_token:
        _check_tokens(batch, card, field)
    elif not card.pools_prompt:
        batch = batch.unpooled(tokenizer.count_prompt(prompt, request.special_tokens))
    return Prepared(batch, tuple(truncated), request.by_token)


async def _texts_of(
    request: EmbeddingRequest, task: EmbeddingTask, limits: Limits, card: ModelCard, tokenizer: TextTokenizer
) -> Sequence[str]:
    """Return the texts that are read; none where the request has the model's own token ids."""
    if request.chat is not None:
        return await write_messages(request.chat, tokenizer, CHARACTERS_PER_TOKEN * limits.max_request_tokens)
    return request.texts or await offload(sum(map(len, request.token_ids)), _decode, request, task, card)


async def _tokenise(
    texts: Sequence[str], encode: Encode, card: ModelCard, field: str
) -> AsyncIterator[list[list[int]]]:
    """Yield the token ids of some texts after the others."""
    most = max(GROUP_CHARACTERS, CHARACTERS_PER_TOKEN * card.max_model_len)
    begin = characters = 0
    for index, text in enumerate(texts):
        if len(text) > most:
            raise ContextLengthError(
                f"`{field}[{index}]` has {len(text)} characters, and a text may have {most}", field
            )
        if characters and characters + len(text) > GROUP_CHARACTERS:
            yield await offload(characters, encode, texts[begin:index])
            begin, characters = index, 0
        characters += len(text)
    yield await offload(characters, encode, texts[begin:])


async def write_messages(chat: Chat, tokenizer: TextTokenizer, most: int) -> list[str]:
    """Return the text of each conversation, as the model's chat template writes it: so many characters."""
    return await offload(chat.size, tokenizer.render, chat.conversations, chat.variables, chat.field, most)


async def _as_group(inputs: list[list[int]]) -> AsyncIterator[list[list[int]]]:
    yield inputs


def _prompt_of(request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard) -> str:
    """Return what the request and the model want before each text."""
    if request.chat is not None:
        return ""  # the template has written it
    if request.prompt is None and request.instruction is None:
        return card.default_prompt
    prompts = card.prompts | task.prompts
    if request.instruction is not None:
        return _instruct(request.instruction, prompts)
    return prompt_text(request.prompt, prompts)


def prompt_text(prompt: Prompt | None, prompts: dict[str, str]) -> str:
    """Return the text of the prompt that a request names; none where the model may have none for it.

    Raises MissingCapabilityError.
    """
    if prompt is None:
        return ""
    name = next((name for name in prompt.names if name in prompts), None)
    if name is None and _must_have(prompt, prompts):
        known = f"it has {', '.join(sorted(prompts))}" if prompts else "it has none"
        raise MissingCapabilityError(f"the model has no prompt of that name; {known}", prompt.field)
    return prompts[name] if name is not None else ""


def _must_have(prompt: Prompt, prompts: dict[str, str]) -> bool:
    return prompt.required and not (prompt.usual and not prompts)


def takes_instructions(prompts: dict[str, str]) -> bool:
    """Whether a model with these prompts was trained to follow instructions."""
    return PLACE in prompts.get(INSTRUCTION, "") or any(map(INSTRUCT_PROMPT.fullmatch, prompts.values()))


def _instruct(instruction: str, prompts: dict[str, str]) -> str:
    """Return the prompt with an instruction of the client's, in the form that the model was trained with."""
    if PLACE in prompts.get(INSTRUCTION, ""):
        return prompts[INSTRUCTION].replace(PLACE, instruction)
    for prompt in prompts.values():
        if match := INSTRUCT_PROMPT.fullmatch(prompt):
            return f"{match[1]}{instruction}{match[2]}"
    raise MissingCapabilityError("the model takes no instructions", INSTRUCTION)


def _decode(request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard) -> list[str]:
    """Return the texts behind cl100k's token ids; none where the ids are the model's own."""
    if task.token_input != "cl100k" or request.own_ids:
        return []
    texts = []
    for index, ids in enumerate(request.token_ids):
        try:
            pieces = [card.cl100k[token] for token in ids]
        except IndexError:
            pieces = [b""]
        if not all(pieces):
            raise InvalidRequestError(
                f"`{request.input_field}[{index}]` holds a token id beyond cl100k's vocabulary",
                request.input_field,
            )
        # Bytes that aren't UTF-8 are those of a character cut in two.
        texts.append(b"".join(pieces).decode("utf-8", "replace"))
    return texts


def _check_token_ids(request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard) -> list[list[int]]:
    field = request.input_field
    if task.token_input == "reject":
        raise MissingCapabilityError("this model takes texts only, no token ids", field)
    if request.instruction is not None:
        raise InvalidRequestError("an instruction can't be put before token ids; send text", field)
    prompts = card.prompts | task.prompts
    wanted = request.prompt
    if wanted is not None and (any(map(prompts.get, wanted.names)) or _must_have(wanted, prompts)):
        raise InvalidRequestError("a prompt can't be put before token ids; send text", wanted.field)
    for index, ids in enumerate(request.token_ids):
        if max(ids) >= card.vocab_size:
            raise InvalidRequestError(
                f"`{field}[{index}]` holds a token id beyond the vocabulary of {card.vocab_size}", field
            )
    return [list(ids) for ids in request.token_ids]


def _truncate(
    inputs: list[list[int]],
    request: EmbeddingRequest,
    task: EmbeddingTask,
    card: ModelCard,
    cut: Callable[[list[int], int, bool], list[int]],
) -> tuple[list[list[int]], int, tuple[int, ...]]:
    """Cut what is too long, where that is wanted; return the most tokens of an input, and which were cut."""
    longest = card.max_model_len
    own = task.truncation if task.truncation == "none" else request.truncation_side or task.truncation
    side = request.truncation or own
    wanted = longest if request.truncate_prompt_tokens == LONGEST else request.truncate_prompt_tokens
    if wanted is None and side == "none":
        return inputs, longest, ()
    if request.truncate_within and wanted is not None and wanted > longest:
        raise InvalidRequestError(
            f"`truncate_prompt_tokens` can't be {wanted}; the model takes {longest}", "truncate_prompt_tokens"
        )
    longest = min(longest, wanted or longest)
    if request.truncation == "none":
        return inputs, longest, ()
    drop_start = card.truncates_start if side == "none" else side == "start"
    truncated = tuple(index for index, ids in enumerate(inputs) if len(ids) > longest)
    for index in truncated:
        inputs[index] = cut(inputs[index], longest, drop_start)
    return inputs, longest, truncated


def _check_lengths(  # noqa: PLR0913, PLR0917 - where the inputs stand, and what bounds them
    inputs: list[list[int]], begin: int, total: int, longest: int, limits: Limits, field: str
) -> int:
    """Return the tokens of these inputs and of the `total` before them. Raises the first that is too long."""
    for index, ids in enumerate(inputs, begin):
        total += len(ids)
        if not ids:
            raise InvalidRequestError(f"`{field}[{index}]` holds nothing that the model can read", field)
        if len(ids) > longest:
            raise ContextLengthError(
                f"`{field}[{index}]` has {len(ids)} tokens, and the model takes {longest}", field
            )
    if total > limits.max_request_tokens:
        raise ContextLengthError(
            f"{total} tokens are more than the {limits.max_request_tokens} of one request", field
        )
    return total


def _check_vocabulary(batch: TokenBatch, size: int, field: str) -> None:
    """Refuse what the model's embedding table has no row for: it would end the engine."""
    if batch.ids.max() < size:
        return
    index = next(index for index, ids in enumerate(batch) if ids.max() >= size)
    raise InvalidRequestError(f"`{field}[{index}]` holds a token id beyond the vocabulary of {size}", field)


def _check_tokens(batch: TokenBatch, card: ModelCard, field: str) -> None:
    """Refuse what can't be answered with a vector for each token."""
    if not card.token_dimension:
        raise MissingCapabilityError(
            "the model gives no vectors of single tokens; /embed gives one for each input"
        )
    if batch.tokens > (most := MOST_NUMBERS // card.token_dimension):
        raise ContextLengthError(f"{batch.tokens} tokens are more than the {most} of one such answer", field)


def _check_vectors(request: EmbeddingRequest, task: EmbeddingTask, card: ModelCard) -> None:
    """Refuse vectors that the model can't give: of another size, or without unit length."""
    if request.normalize is False and card.normalizes:
        raise MissingCapabilityError("the model's vectors have unit length", request.normalize_field)
    known = (*task.dimensions, *card.dimensions)
    sizes = sorted({*(size for size in known if size < card.dimension), card.dimension})
    if request.dimensions is None or request.dimensions in sizes:
        return
    field = request.dimensions_field
    some = f"1 to {card.dimension}" if len(sizes) == card.dimension else ", ".join(map(str, sizes))
    raise InvalidRequestError(f"`{field}` can't be {request.dimensions}; this model gives {some}", field)
