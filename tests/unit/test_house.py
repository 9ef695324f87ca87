"""The rules of the house, held by tests."""

import ast
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import deployments
from deployments import errors

ROOT = Path(deployments.__file__).parent

# A folder, or a module beside the folders, imports only what stands before it.
ORDER = [
    "errors",
    "metrics",
    "tracing",
    "logs",
    "priority",
    "machine",
    "durable",
    "config",
    "front",
    "keys",
    "plan",
    "api",
    "engine",
    "transport",
    "replica",
    "dispatch",
    "bulk",
    "status",
    "page",
    "http",
    "batches",
    "client",
    "jobs",
    "app",
    "command",
    "__main__",
]
# What is heavy, and where alone it may be imported.
HEAVY = {
    "torch": "engine",
    "vllm": "engine",
    "transformers": "engine.tokenizer.loading",
    "ray": "app batches.deployment batches.desk bulk client command dispatch front.direct front.spare http "
    "replica transport",
    "fastapi": "http batches.routes",
}
MAX_FILES, MAX_LINES, MAX_FUNCTION = 12, 320, 40
# They are tables: of metrics, of routes, of a file's parts.
TABLES = {"Metrics.__init__", "batch_routes", "ray_service"}


@functools.cache
def modules() -> list[tuple[str, Path]]:
    """Return every module of the package by name."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("deployments", *path.relative_to(ROOT).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@functools.cache
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


def test_a_folder_imports_only_what_stands_before_it() -> None:
    """So there is no cycle among them either."""
    for name, path in modules():
        if name != "deployments":
            place = ORDER.index(name.split(".")[1])
            for other in imports(path):
                if other.startswith("deployments."):
                    assert ORDER.index(other.split(".")[1]) <= place, f"{name} imports {other}"
    assert not imports(ROOT / "__init__.py")


def test_heavy_modules_are_imported_only_where_allowed() -> None:
    """And vllm and transformers nowhere at the top of a file."""
    for name, path in modules():
        for other in imports(path):
            allowed = HEAVY.get(other.partition(".")[0], "deployments").split()
            inside = f"{name}.".removeprefix("deployments.")
            assert allowed == ["deployments"] or inside.startswith(tuple(f"{a}." for a in allowed)), (
                f"{name} imports {other}"
            )
        # What runs in vLLM's own workers needs no waiting for them.
        heavy = {n.partition(".")[0] for n in imports(path, True)} & {"vllm", "torch", "transformers"}
        assert not heavy or name == "deployments.engine.packed", name


def test_every_room_is_small() -> None:
    """Folders, files and functions are such that one sees all of them at once."""
    files = {path: len(path.read_text().splitlines()) for _, path in modules()}
    for path, lines in files.items():
        assert lines <= MAX_LINES, path
        assert sum(other.parent == path.parent for other in files) <= MAX_FILES, path.parent
        tree = ast.parse(path.read_text())
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        scopes: list[ast.Module | ast.ClassDef] = [tree, *classes]
        for scope in scopes:
            for node in scope.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    name = f"{scope.name}.{node.name}" if isinstance(scope, ast.ClassDef) else node.name
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= MAX_FUNCTION or name in TABLES, f"{path}: {name} has {length} lines"


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
