"""Reads worker files: a file or a folder of them → frozen workers, or every mistake at once."""

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli
from pydantic import SecretStr, ValidationError

from deployments.config.explain import Location, Problem, did_you_mean, dotted, explain, table_at
from deployments.config.init import is_model, worker_text
from deployments.config.model_files import PACKAGE, ModelFiles, is_hub_id, resolve_model_path
from deployments.config.worker import RESERVED_ENGINE_ARGS, Worker
from deployments.errors import ConfigError

# What both engines take of `[generator.engine_args]`.
TRANSFORMERS_ARGS = frozenset({"dtype", "revision", "trust_remote_code"})

# WORKER__GENERATOR__MAX_NUM_SEQS=32 sets the key in every file, WORKER_<STEM>__… in one of them.
ENV_PREFIX = "WORKER"
ENV_SEPARATOR = "__"


def load_workers(
    path: str | Path, check_models: bool = True, environ: Mapping[str, str] = os.environ
) -> tuple[Worker, ...]:
    """Read a worker file or a folder of them, or the files of a model that has none.

    With `check_models`, a model folder that is named must exist on this machine. Raises ConfigError
    that lists every mistake in every file.
    """
    return tuple(load_files(path, check_models, environ).values())


def load_files(
    path: str | Path, check_models: bool = True, environ: Mapping[str, str] = os.environ
) -> dict[Path, Worker]:
    """As `load_workers`; return each worker with its file."""
    workers, problems = read_workers(path, check_models, environ)
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    return workers


def read_workers(
    path: str | Path, check_models: bool = True, environ: Mapping[str, str] = os.environ
) -> tuple[dict[Path, Worker], list[Problem]]:
    """Read what can be read; return the sound workers by file, and all the problems."""
    path = Path(path)
    workers: dict[Path, Worker] = {}
    if path.is_dir() and not is_model(path):
        files = sorted(path.glob("*.toml"))
        problems = [] if files else [Problem(str(path), "", "no *.toml file in this folder")]
    else:
        files, problems = [path], []
    for file in files:
        worker, found = _read_file(file, check_models, environ)
        problems += found
        if worker is not None:
            workers[file] = worker
    problems += _clashes(workers)
    return workers, problems


def _read_file(
    file: Path, check_models: bool, environ: Mapping[str, str]
) -> tuple[Worker | None, list[Problem]]:
    try:
        # Some editors put a mark first.
        text = worker_text(file) if is_model(file) else file.read_text(encoding="utf-8-sig")
        content = tomli.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        return None, [Problem(str(file), "", f"can't be read: {reason}")]
    except tomli.TOMLDecodeError as error:
        return None, [Problem(str(file), "", f"isn't valid TOML: {error}")]
    except ValueError as error:  # of a model's own files
        return None, [Problem(str(file), "generator.model_path", str(error))]
    overrides, problems = _override(content, file, environ)
    worker = None
    try:
        worker = Worker.model_validate(content)
    except ValidationError as error:
        # What pydantic says of a table hides nothing else, so the model is checked all the same.
        for detail in error.errors():
            problem = explain(str(file), content, detail)
            variable = overrides.get(tuple(map(str, detail["loc"])))
            said = f"{problem.message} (from the variable {variable})" if variable else problem.message
            problems.append(Problem(problem.file, problem.key, said))
    problems += list(_check_engine_args(str(file), content))
    problems += list(_check_model(file, content, check_models))
    if worker is not None and worker.deployment.num_gpus == 0:
        problems += [Problem(str(file), key, reason) for key, reason in worker.cpu_objections()]
    if worker is not None and worker.generator.world_size > 1 and 0 < (worker.deployment.num_gpus or 1) < 1:
        problems.append(Problem(str(file), "deployment.num_gpus", "ranks can't share a GPU; use 1"))
    if worker is None or problems:
        return None, sorted(set(problems))
    return _with_absolute_path(worker, file), []


# --- environment -------------------------------------------------------------------------------


def _override(
    content: dict[str, Any], file: Path, environ: Mapping[str, str]
) -> tuple[dict[Location, str], list[Problem]]:
    """Put the environment's values into the file's; return which variable set what."""
    overrides: dict[Location, str] = {}
    problems = []
    own = f"{ENV_PREFIX}_{re.sub(r'[^A-Za-z0-9]', '_', file.stem).upper()}"
    for prefix in (ENV_PREFIX, own):  # the file's own variables come last and win
        start = prefix + ENV_SEPARATOR
        for variable in sorted(environ):
            if not variable.startswith(start):
                continue
            location = tuple(variable.removeprefix(start).lower().split(ENV_SEPARATOR))
            target: Any = content
            for table in location[:-1]:
                target = target.setdefault(table, {}) if isinstance(target, dict) else None
            if not isinstance(target, dict):
                message = f"is no table, so {variable} can't set a key of it"
                problems.append(Problem(str(file), dotted(location[:-1]), message))
                continue
            target[location[-1]] = _value(location, environ[variable])
            overrides[location] = variable
    return overrides, problems


def _value(location: Location, text: str) -> Any:
    """Read a variable as TOML, except for keys that hold text: a token of digits stays text."""
    field = table_at(location[:-1])
    info = field.model_fields.get(location[-1]) if field else None
    annotation: Any = info.annotation if info else None
    kinds = {annotation, *getattr(annotation, "__args__", ())}
    if kinds & {str, SecretStr}:
        return int(text) if int in kinds and text.isdecimal() else text
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text  # a bare string, as people write them in an environment


# --- what the file alone can't tell --------------------------------------------------------------


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """Return the fields of the installed vLLM's EngineArgs, read as text; empty where there is none.

    Importing vLLM takes seconds, and a check has to be there in an instant.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py").read_text("utf-8")
    _, _, body = source.partition("class EngineArgs")
    body, _, _ = body.partition("def __post_init__")
    return frozenset(re.findall(r"^    ([a-z]\w*):", body, flags=re.MULTILINE))


def _check_engine_args(file: str, content: dict[str, Any]) -> Iterator[Problem]:
    generator = content.get("generator")
    arguments = generator.get("engine_args") if isinstance(generator, dict) else None
    if not isinstance(arguments, dict) or generator is None or generator.get("type") != "vllm":
        return
    known = engine_arg_names()
    for name in arguments:
        if known and name not in known and name not in RESERVED_ENGINE_ARGS:
            hint = did_you_mean(name, sorted(known))
            yield Problem(file, f"generator.engine_args.{name}", f"not an engine argument{hint}")


def _check_model(file: Path, content: dict[str, Any], check_models: bool) -> Iterator[Problem]:
    """Check the model's folder against the file, as far as both can be read."""
    generator = content.get("generator")
    if not isinstance(generator, dict) or generator.get("type") != "vllm":
        return
    model_path = generator.get("model_path")
    if not isinstance(model_path, str) or not model_path:
        return
    try:
        folder = resolve_model_path(model_path)
        if not model_path.startswith(PACKAGE):
            folder = str(file.parent / folder)
            if is_hub_id(model_path) and not Path(folder).is_dir():
                return
        files = ModelFiles.read(folder)
    except (FileNotFoundError, ValueError) as error:
        if check_models:
            yield Problem(str(file), "generator.model_path", str(error))
        return

    def number(key: str) -> int:
        value = generator.get(key)
        return value if isinstance(value, int) and value > 0 else 1

    length = generator.get("max_model_len")
    for key, reason in files.objections(
        length if isinstance(length, int) else None,
        number("tensor_parallel_size"),
        number("pipeline_parallel_size"),
        wanted := generator.get("engine"),
    ):
        yield Problem(str(file), key, reason)
    if files.engine(wanted)[0] == "sentence-transformers":
        for key in set(generator.get("engine_args", ())) - TRANSFORMERS_ARGS:
            reason = "the engine sentence-transformers has no such argument"
            yield Problem(str(file), f"generator.engine_args.{key}", reason)


def _with_absolute_path(worker: Worker, file: Path) -> Worker:
    """A relative folder is meant from its worker file, wherever the replica runs."""
    named = worker.generator.model_path
    path = file.parent / named
    if not named or named.startswith((PACKAGE, "/")) or not path.is_dir():
        return worker
    generator = worker.generator.model_copy(update={"model_path": str(path.resolve())})
    return worker.model_copy(update={"generator": generator})


def _clashes(workers: Mapping[Path, Worker]) -> list[Problem]:
    """What two files may not share: the deployment's name and the models' public names."""
    problems = []
    names: dict[tuple[str, str], Path] = {}
    for file, worker in workers.items():
        claims = [("queue.checkpoint_name", worker.name)]
        if worker.monitoring.metrics_port:
            claims.append(("monitoring.metrics_port", str(worker.monitoring.metrics_port)))
        claims += [("queue.models", name) for name in worker.queue.models]
        for key, name in claims:
            other = names.setdefault((key, name), file)
            if other != file:
                problems.append(Problem(str(file), key, f"`{name}` is taken by {other.name}"))
    return problems
