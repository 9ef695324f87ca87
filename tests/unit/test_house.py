"""The rules of the house, held by tests."""

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deployments
from deployments import errors

ROOT = Path(deployments.__file__).parent

# A module imports only what stands below it: those of a later line may import those of an earlier one.
LAYERS = [
    ["deployments.errors", "deployments.metrics", "deployments.front.guard", "deployments.engine.priority"],
    ["deployments.config.worker", "deployments.config.model_files", "deployments.keys.file"],
    ["deployments.config.load", "deployments.plan.plan"],
    ["deployments.plan.manifest", "deployments.engine.batch", "deployments.engine.cores"],
    ["deployments.engine.tokenizer", "deployments.engine.cl100k", "deployments.engine.speed"],
    ["deployments.engine"],
    ["deployments.engine.fake", "deployments.engine.turns", "deployments.engine.vllm"],
    ["deployments.api.encoding", "deployments.api.envelope", "deployments.api.fields"],
    ["deployments.api.request"],
    ["deployments.api.openai", "deployments.api.pharia", "deployments.api.cohere", "deployments.api.tei"],
    ["deployments.api.embed", "deployments.api.batches", "deployments.api.upload"],
    ["deployments.batches.storage", "deployments.batches.records"],
    ["deployments.batches.store", "deployments.batches.plan"],
    ["deployments.batches.job"],
    ["deployments.batches.runner"],
    ["deployments.replica.scaling", "deployments.transport.local"],
    [
        "deployments.replica.replica",
        "deployments.transport.router",
        "deployments.dispatch.work",
        "deployments.dispatch.meter",
        "deployments.transport.broadcast",
        "deployments.front.spare",
        "deployments.transport.applications",
        "deployments.bulk.window",
        "deployments.dispatch.offload",
    ],
    ["deployments.dispatch.admission"],
    ["deployments.dispatch.lanes", "deployments.dispatch.prepare", "deployments.transport.serve_router"],
    ["deployments.http.metrics_port", "deployments.dispatch.cache"],
    ["deployments.dispatch.calls"],
    ["deployments.dispatch.dispatch"],
    ["deployments.dispatch.catalog"],
    ["deployments.bulk.connection"],
    ["deployments.client"],
    ["deployments.keys.rates", "deployments.keys.usage", "deployments.http.access"],
    ["deployments.http.auth"],
    ["deployments.http.serving", "deployments.http.documentation"],
    ["deployments.http.pharia", "deployments.batches.serving", "deployments.batches.lines"],
    ["deployments.http.routes", "deployments.batches.routes", "deployments.dispatch.workers"],
    ["deployments.http.ingress"],
    ["deployments.batches.deployment"],
    ["deployments.app"],
    ["deployments.jobs.source", "deployments.jobs.ledger", "deployments.jobs.progress"],
    ["deployments.jobs.sink"],
    ["deployments.jobs.run"],
    ["deployments.command.serve", "deployments.command.keys", "deployments.command.embed"],
    ["deployments.__main__"],
]
EMPTY = {
    "deployments",
    "deployments.api",
    "deployments.batches",
    "deployments.config",
    "deployments.gateway",
    "deployments.job",
}
# The engines are made by name, at use.
UPWARD = {
    ("deployments.engine", "deployments.engine.fake"),
    ("deployments.engine", "deployments.engine.vllm"),
}
# Modules that are heavy, and the only ones that may import them.
HEAVY = {
    "torch": {"deployments.engine.vllm"},
    "vllm": {"deployments.engine.vllm"},
    "transformers": {"deployments.engine.tokenizer"},
    "ray": {
        "deployments.app",
        "deployments.client",
        "deployments.bulk.connection",
        "deployments.command.serve",
        "deployments.replica.replica",
        "deployments.transport.applications",
        "deployments.transport.router",
        "deployments.replica.scaling",
        "deployments.transport.broadcast",
        "deployments.dispatch.calls",
        "deployments.front.spare",
        "deployments.dispatch.dispatch",
        "deployments.http.ingress",
        "deployments.dispatch.workers",
        "deployments.batches.deployment",
    },
    "fastapi": {
        "deployments.http.ingress",
        "deployments.http.routes",
        "deployments.batches.routes",
        "deployments.http.documentation",
    },
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield every module of the package by name."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("deployments", *path.relative_to(ROOT).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the names of all modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = {name for name, _ in modules()}
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules or {node.module}
    return found


def test_a_module_imports_only_what_stands_below_it() -> None:
    """Data flows one way."""
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for name, path in modules():
        if name in EMPTY:
            assert not imports(path), name
            continue
        assert name in level, f"{name} has no place in LAYERS"
        for other in imports(path):
            if other.startswith("deployments.") and (name, other) not in UPWARD:
                assert level[other] < level[name], f"{name} imports {other}"


def test_heavy_modules_are_imported_only_where_allowed() -> None:
    """And vllm and transformers nowhere at the top of a file."""
    for name, path in modules():
        for other in imports(path):
            package = other.partition(".")[0]
            assert name in HEAVY.get(package, {name}), f"{name} imports {other}"
        assert not {n.partition(".")[0] for n in imports(path, True)} & {"vllm", "torch", "transformers"}, (
            name
        )


def all_errors() -> list[type[errors.EmbeddingError]]:
    """Return the whole tree."""
    found, waiting = [], [errors.EmbeddingError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_survives_pickling(kind: type[errors.EmbeddingError]) -> None:
    """Message, param and retry_after come through; so does the class, on which status and code stand."""
    copy = pickle.loads(pickle.dumps(kind("what", "input", 1.5)))
    assert type(copy) is kind
    assert (copy.message, copy.param, copy.retry_after) == ("what", "input", 1.5)
    assert 400 <= kind.status < 600
    assert kind.status not in (501, 502, 504)


WITHOUT_VLLM = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "vllm" else find_spec(name, package)
"""


def run_without_vllm(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python in which vLLM, torch and transformers can't be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM + code], capture_output=True, text=True, check=False
    )


def test_the_base_package_runs_the_fake_engine_without_vllm() -> None:
    """Importing everything, planning, embedding."""
    result = run_without_vllm("""
import asyncio
import deployments.app, deployments.command.serve
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine
from deployments.config.worker import FakeEngineArgs
engine = FakeEngine(FakeEngineArgs(dimension=8))
engine.start()
print(asyncio.run(engine.embed(TokenBatch.of([[1, 2], [3]]))).shape)
""")
    assert result.stdout == "(2, 8)\n", result.stderr


def test_asking_for_vllm_without_it_says_what_to_install() -> None:
    """One line, with the extras' names."""
    result = run_without_vllm("""
from deployments.engine.vllm import require_vllm
from deployments.errors import EngineStartError
try:
    require_vllm()
except EngineStartError as error:
    print(error)
""")
    assert result.stdout.count("\n") == 1
    assert "extra `cpu` or `gpu`" in result.stdout, result.stderr
