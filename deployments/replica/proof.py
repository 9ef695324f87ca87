"""What a replica finds out of its engine before it lets anybody in."""

import logging
from collections.abc import Iterator

import numpy as np

from deployments.engine import Engine, ModelCard
from deployments.engine.batch import TokenBatch, cosines
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import EngineStartError
from deployments.replica.texts import TEXTS

logger = logging.getLogger("ray.serve")

# Longer ones would take a large model on a CPU minutes.
MAX_TOKENS = 256
# Each costs a step.
ALONE = 3
# A batch changes the order of sums, and so the last digits of 16-bit numbers.
MIN_COSINE = 0.99
# Texts whose vectors are nearer than this are one to the model.
SAME = 1 - 1e-7


async def prove(name: str, engine: Engine, card: ModelCard) -> None:
    """Embed texts of odd kinds, all at once and the first alone; log those that the model has no vector for.

    Raises EngineStartError where the vectors of all of them are useless.
    """
    tokenizer = TextTokenizer(card.tokenizer)
    known: dict[str, list[int]] = {}
    for what, ids in zip(TEXTS, tokenizer.encode(list(TEXTS.values())), strict=True):
        if ids and max(ids) < card.vocab_size:
            known[what] = ids[: min(MAX_TOKENS, card.max_model_len)]
    inputs = list(known.values())
    together = await engine.embed(TokenBatch.of(inputs), bulk=True)
    alone = [await engine.embed(TokenBatch.of([ids]), bulk=True) for ids in inputs[:ALONE]]
    sound = np.isfinite(together).all(axis=1) & together.any(axis=1)
    for reason in _reasons(together, np.concatenate(alone), sound):
        raise EngineStartError(reason)
    for what in np.array(list(known))[~sound]:
        logger.warning("%s: the model has no vector for %s: it comes as NaN, infinity or zeros", name, what)


def _reasons(together: np.ndarray, alone: np.ndarray, sound: np.ndarray) -> Iterator[str]:
    """Yield why nobody could use these vectors, of shape (texts, dimension), of which some are `sound`."""
    if not sound.any():
        yield "the model gives vectors with NaN or infinity in them, or zeros alone"
    others = np.roll(together[sound], 1, axis=0)
    if len(others) > 1 and (cosines(together[sound], others) > SAME).all():
        yield "the model gives all texts the same vector"
    few = sound[:ALONE]
    if not (cosines(together[:ALONE][few], alone[few]) >= MIN_COSINE).all():
        yield "the model gives a text another vector beside others than alone"
