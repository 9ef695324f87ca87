"""The blocks of the README and of the rooms' pages run as they stand, but for the server's address."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import yaml

from deployments.__main__ import _parser
from deployments.config.load import load_workers
from tests.harness.jobs import address_of, environ
from tests.harness.server import Server
from tests.model.conftest import MINILM

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
PAGES = {
    page.parent.name if page.parent != ROOT else "": page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("deployments/*/README.md")))
}
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str, *pages: str) -> list[str]:
    """Return the code blocks of a language, in order, each once; of the README where no page is named."""
    texts = [PAGES[page] for page in pages or [""]]
    found = [
        block
        for text in texts
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]
    assert found
    return list(dict.fromkeys(found))


def test_the_curl_command_answers_as_shown(two_models: Server) -> None:
    """The same keys and first numbers as in the block that follows it."""
    (command,) = blocks("bash")
    shell = command.replace(ADDRESS, two_models.url)
    answer = json.loads(subprocess.run(["bash", "-c", shell], capture_output=True, check=True).stdout)
    vector = answer["data"][0]["embedding"]
    assert len(vector) == 384
    shown = json.loads(blocks("json")[0].replace(", …", ""))
    numbers = shown["data"][0]["embedding"]
    assert numbers == pytest.approx(vector[: len(numbers)], abs=5e-3)
    answer["data"][0]["embedding"] = numbers
    for name in ("id", "created"):  # another one each time
        assert type(answer.pop(name)) is type(shown.pop(name))
    assert answer == shown
    assert answer["model"] == MINILM


@pytest.mark.parametrize("code", blocks("python", *PAGES))
def test_python_blocks_run(two_models: Server, code: str, tmp_path: Path) -> None:
    """Each on its own, against the running server and on its cluster."""
    code = code.replace(ADDRESS, two_models.url)
    environment = environ(address_of(two_models))
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr


def test_the_worker_file_loads_and_shows_every_key(tmp_path: Path) -> None:
    """What the schema has, the page explains; what it shows, the schema has. The README's is a short one."""
    (short,) = blocks("toml")
    file = tmp_path / "all-minilm-l6-v2.toml"
    file.write_text(short)
    assert load_workers(file, environ={})[0].name == MINILM
    text, scaling, *_ = blocks("toml", "config")
    file.write_text(text)
    (worker,) = load_workers(file, environ={})
    shown = tomli.loads(text)
    file.write_text(text.replace("num_replicas = 1", "") + scaling)
    (scaled,) = load_workers(file, environ={})
    assert scaled.deployment.autoscaling is not None
    for table in ("generator", "queue", "monitoring", "limits"):
        assert set(type(getattr(worker, table)).model_fields) == set(shown[table])
    for key in type(worker.deployment).model_fields:
        assert key in PAGES["config"]
    task = shown["queue"]["models"][MINILM]["embedding_task"]
    assert set(task) == set(type(worker.queue.models[MINILM].embedding_task).model_fields)


def test_commands_of_the_console_blocks_exist(tmp_path: Path) -> None:
    """Every make target is there, and every command parses; check and plan run."""
    (tmp_path / "workers").symlink_to(ROOT / "deployments" / "workers")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    lines = [line for block in blocks("console", *PAGES) for line in block.splitlines() if line]
    assert len(lines) >= 8
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert arguments[0] in targets
        elif program == "embedding-cluster" and arguments[0] in ("embed", "status"):
            assert _parser().parse_args(arguments)
        elif program == "embedding-cluster" and arguments[0] != "serve":
            command = [sys.executable, "-m", "deployments", *arguments]
            subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
        else:
            assert arguments[0] in ("serve", "run")


def test_the_deploy_file_names_the_builder() -> None:
    """Its import path and arguments are those of `build`."""
    from deployments.app import BuildArguments, build

    (application,) = yaml.safe_load(blocks("yaml")[0])["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    BuildArguments(**application["args"])
