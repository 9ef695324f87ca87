"""`embedding-cluster init`, a model's worker file; `verify`, our vectors beside sentence-transformers'."""

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.config.init import is_model, worker_text
from deployments.config.load import load_files
from deployments.config.model_files import resolve_model_path
from deployments.config.worker import EmbeddingTask, Limits
from deployments.errors import ConfigError
from deployments.machine import cores_here
from deployments.plan.placement import Machine
from deployments.plan.plan import WorkerPlan, make_plans
from deployments.replica.texts import TEXTS

if TYPE_CHECKING:
    import numpy as np

# bfloat16 against float32; in float32 both differ in their last digits.
MIN_COSINES = {"float32": 0.99999}
MIN_COSINE = 0.998
# What is embedded: the text, and the name of its prompt; None is the model's default.
Text = tuple[str, str | None]


@dataclass(frozen=True)
class Row:
    """A line of the table: what was embedded, its tokens here and there, the least cosine."""

    what: str
    ours: int
    theirs: int
    cosine: float


@dataclass(frozen=True)
class Embedded:
    """What our engine made of the texts, all at once and each alone: arrays of shape (len(texts), dimension).

    `counts` are the tokens of each.
    """

    dtype: str
    max_model_len: int
    texts: dict[str, Text]
    together: "np.ndarray"
    alone: "np.ndarray"
    counts: list[int]


def add_model_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both to the command line."""
    init = commands.add_parser("init", help="print a model's worker file, with what its own files say")
    init.add_argument("model", type=Path, help="a model's folder, or its id on a hub")
    init.set_defaults(command=_init)
    what = "compare each worker's vectors with sentence-transformers'; exit status 1 where they differ"
    verify = commands.add_parser("verify", help=what)
    verify.add_argument("path", help="worker file, folder of them, or a model")
    verify.set_defaults(command=_verify)


def _init(parsed: argparse.Namespace) -> int:
    if not is_model(parsed.model):
        raise ConfigError(f"{parsed.model}: neither a model's folder nor an id like ORGANISATION/MODEL")
    try:
        print(worker_text(parsed.model), end="")
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{parsed.model}: {error}") from error
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    cores = cores_here()
    plans = make_plans(load_files(parsed.path).values(), Machine(cores, 0, cores))
    plans = tuple(plan for plan in plans if plan.engine != "fake")
    differ = 0
    # Each in a process of its own: an engine binds it, and vLLM changes classes of transformers in it.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for plan in plans:
            ours = processes.submit(embed, plan).result()
            rows = processes.submit(compare, plan, ours).result()
            least = MIN_COSINES.get(ours.dtype, MIN_COSINE)
            print(f"{plan.name}: {plan.engine}, {ours.dtype}, cosine of at least {least}")
            for row in rows:
                same = row.ours == row.theirs and row.cosine >= least
                differ += not same
                tokens = f"{row.ours} tokens" + ("" if row.ours == row.theirs else f", not {row.theirs}")
                print(f"  {'same' if same else 'DIFFERENT'}  {row.cosine:.6f}  {row.what}: {tokens}")
    return 1 if differ else 0


def embed(plan: WorkerPlan) -> Embedded:
    """Embed the texts, one of them with each prompt too, by the engine of a plan."""
    import numpy as np  # the command line starts without all of these

    from deployments.api.openai import OpenAIRequest
    from deployments.api.request import Prompt
    from deployments.dispatch.prepare import prepare
    from deployments.engine import make_engine
    from deployments.engine.batch import TokenBatch
    from deployments.engine.tokenizer import TextTokenizer

    engine = make_engine(plan)
    card = engine.start()
    try:
        texts: dict[str, Text] = {what: (text, None) for what, text in TEXTS.items()}
        texts.update({f"prompt `{use}`": (TEXTS["a sentence"], use) for use in card.prompts})
        tokenizer = TextTokenizer(card.tokenizer)
        task = EmbeddingTask(truncation="start" if card.truncates_start else "end")
        inputs = []
        for text, use in texts.values():
            prompt = Prompt((use,), "prompt_name") if use is not None else None
            request = OpenAIRequest(texts=[text], prompt=prompt)
            inputs.append(asyncio.run(prepare(request, task, Limits(), card, tokenizer)).batch)
        together = asyncio.run(engine.embed(TokenBatch.join([each.ids for each in inputs])))
        alone = [asyncio.run(engine.embed(each)) for each in inputs]
    finally:
        engine.stop()
    counts = [each.tokens for each in inputs]
    return Embedded(card.dtype, card.max_model_len, texts, together, np.concatenate(alone), counts)


def compare(plan: WorkerPlan, ours: Embedded) -> list[Row]:
    """Embed the same texts by sentence-transformers in float32; return both beside each other."""
    import numpy as np

    from deployments.engine.batch import cosines
    from deployments.engine.sentence_transformers import reference

    folder = resolve_model_path(plan.worker.generator.model_path)
    texts = list(ours.texts.values())
    theirs, counts = reference(folder, texts, ours.max_model_len, plan.engine_args)
    least = np.minimum(cosines(ours.together, theirs), cosines(ours.alone, theirs))
    rows = zip(ours.texts, ours.counts, counts, map(float, least), strict=True)
    return [Row(*row) for row in rows]
