"""`embedding-cluster init`, a model's worker file; `verify`, our vectors beside sentence-transformers'."""

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from deployments.config.init import is_model, worker_text
from deployments.config.load import load_files
from deployments.config.model_files import resolve_model_path
from deployments.errors import ConfigError
from deployments.machine import cores_here
from deployments.plan.placement import Machine
from deployments.plan.plan import WorkerPlan, make_plans

TEXTS = {
    "a word": "embedding",
    "a sentence": "The quick brown fox jumps over the lazy dog.",
    "capitals": "NATO AND UNESCO MET IN PARIS",
    "accents": "Crème brûlée à la façon de Noël, naïve Übermut",
    "German": "Der Bundestag hat am Donnerstag über den Haushalt beraten.",
    "Chinese and Japanese": "北京是中国的首都。東京は日本の首都です。",
    "Arabic and Russian": "مرحبا بالعالم. Москва слезам не верит.",
    "emoji": "Great job 👍🏽🎉 see you 👩‍👩‍👧",
    "numbers and signs": "3.14159, 1,000,000 €; 50 % @ #7 (a+b)^2 = c_1",
    "code": "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}\n",
    "spaces": "  two  spaces\t\ttabs\n\n\nlines  ",
    "special tokens": "[CLS] a [MASK] b </s> <s> [SEP] c <|endoftext|>",
    "as long as it takes, and longer": "It was the best of times, it was the worst of times. " * 2000,
}
# bfloat16 against float32; in float32 both differ in their last digits.
MIN_COSINES = {"float32": 0.99999}
MIN_COSINE = 0.998
# One row of the table: what was embedded, tokens here and there, cosine.
Row = tuple[str, int, int, float]


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
    # An engine binds its process and sets variables for vLLM: each has one of its own.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for plan, (dtype, rows) in zip(plans, processes.map(compare, plans), strict=True):
            least = MIN_COSINES.get(dtype, MIN_COSINE)
            print(f"{plan.name}: {plan.engine}, {dtype}, cosine of at least {least}")
            for what, ours, theirs, cosine in rows:
                same = ours == theirs and cosine >= least
                differ += not same
                tokens = f"{ours} tokens" if ours == theirs else f"{ours} tokens, not {theirs}"
                print(f"  {'same' if same else 'DIFFERENT'}  {cosine:.6f}  {what}: {tokens}")
    return 1 if differ else 0


def compare(plan: WorkerPlan) -> tuple[str, list[Row]]:
    """Embed the texts, one of them with each prompt too, by both; return our dtype and the rows."""
    import numpy as np  # the command line starts without all of these

    from deployments.engine import make_engine
    from deployments.engine.batch import TokenBatch
    from deployments.engine.sentence_transformers import reference
    from deployments.engine.tokenizer import TextTokenizer

    engine = make_engine(plan)
    card = engine.start()
    try:
        texts = {what: card.default_prompt + text for what, text in TEXTS.items()}
        texts |= {f"prompt `{use}`": prompt + TEXTS["a sentence"] for use, prompt in card.prompts.items()}
        tokenizer = TextTokenizer(card.tokenizer)
        inputs = [
            tokenizer.truncate(ids, card.max_model_len, drop_start=False, framed=True)
            for ids in tokenizer.encode(list(texts.values()))
        ]
        ours = asyncio.run(engine.embed(TokenBatch.of(inputs)))
    finally:
        engine.stop()
    folder = str(Path(resolve_model_path(plan.worker.generator.model_path)))
    theirs, counts = reference(folder, list(texts.values()), card.max_model_len, plan.engine_args)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(axis=1) / norms
    lengths = map(len, inputs)
    return card.dtype, list(zip(texts, lengths, counts, map(float, cosines), strict=True))
