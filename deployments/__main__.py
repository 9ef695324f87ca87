"""The command line: `embedding-cluster check|plan|init|verify|serve|status|dashboard|embed|keys`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from deployments.command.dashboard import add_dashboard_command, yaml_text
from deployments.command.embed import add_embed_command, positive
from deployments.command.keys import add_keys_command
from deployments.command.models import add_model_commands
from deployments.command.status import add_status_command
from deployments.config.load import load_files
from deployments.config.origins import ORIGINS_VARIABLE, allowed_origins
from deployments.config.worker import MAX_PORT, NO_BATCHES
from deployments.errors import ConfigError, EngineStartError
from deployments.keys.file import KEYS_VARIABLE
from deployments.keys.ring import key_source, require_keys
from deployments.machine import cores_here
from deployments.plan.manifest import WORKERS_FOLDER, Front, ray_service, serve_config, without_secrets
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans

BUNDLED = Path(__file__).parent / "workers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, or 2 where worker files hold mistakes."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.command(parsed)
        return status
    except (ConfigError, EngineStartError) as error:
        print(error.message, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embedding-cluster", description="Embeddings at company scale.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="check worker files; every mistake with file and key")
    check.set_defaults(command=_check)
    plan = _plan_parser(commands)
    serve = commands.add_parser("serve", help="serve on this machine, on the fast data plane")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port (default: %(default)s)")
    what = "HTTP processes, or `auto`: one for every four cores that no engine has (default: auto)"
    serve.add_argument("--ingress-replicas", type=_count_or_auto, default=0, metavar="N", help=what)
    for command in (plan, serve):
        what = f"client keys (default: ${KEYS_VARIABLE})"
        command.add_argument("--keys", default="", metavar="FILE", help=what)
        command.add_argument("--insecure", action="store_true", help="let other machines in without keys")
        what = f"origins whose pages may ask from a browser, or `*` (default: ${ORIGINS_VARIABLE})"
        command.add_argument("--allow-origins", default="", metavar="URL,…", help=what)
    place = "folder or URL for files and batches, or `off` (default: {})"
    serve.add_argument("--batches", default="", metavar="URL", help=place.format("a folder of your data"))
    plan.add_argument("--batches", default=NO_BATCHES, metavar="URL", help=place.format("off"))
    serve.set_defaults(command=_serve)
    others = (
        add_model_commands,
        add_status_command,
        add_dashboard_command,
        add_embed_command,
        add_keys_command,
    )
    for add in others:
        add(commands)
    what = "worker file, folder of them, or a model (default: the bundled file)"
    for command in (check, plan, serve):
        command.add_argument("path", nargs="?", default=str(BUNDLED), help=what)
    return parser


def _plan_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    plan = commands.add_parser("plan", help="print what would be deployed")
    plan.add_argument("--cpus", type=int, default=0, help="cores of the node (default: this one's)")
    plan.add_argument("--gpus", type=int, default=1, help="GPUs of the cluster (default: %(default)s)")
    plan.add_argument(
        "--format",
        choices=("table", "json", "serve", "rayservice"),
        default="table",
        help="for people; in full; for `serve deploy`; for KubeRay (default: %(default)s)",
    )
    plan.add_argument("--image", default="embedding-cluster:latest", help="container image, for rayservice")
    plan.set_defaults(command=_plan)
    return plan


def _check(parsed: argparse.Namespace) -> int:
    for file, worker in load_files(parsed.path).items():
        print(f"{file}: ok: worker `{worker.name}` serves {', '.join(worker.queue.models)}")
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    allowed_origins(parsed.allow_origins)
    workers = load_files(parsed.path)
    cpus = parsed.cpus or cores_here()
    plans = make_plans(workers.values(), Machine(cpus, parsed.gpus, cpus))
    if parsed.format == "serve":
        keys = str(Path(parsed.keys).resolve()) if parsed.keys else ""
        front = Front(keys, parsed.insecure, batches=parsed.batches, allow_origins=parsed.allow_origins)
        print(yaml_text(serve_config(plans, str(Path(parsed.path).resolve()), front)), end="")
        return 0
    if parsed.format == "rayservice":
        if any(not file.is_file() for file in workers):
            raise ConfigError(f"{parsed.path}: has no worker file; write it: embedding-cluster init")
        files = {
            file.name: without_secrets(file.read_text(encoding="utf-8-sig"), worker)
            for file, worker in workers.items()
        }
        # The keys come from a secret of their own, by the environment.
        front = Front("", parsed.insecure, True, parsed.batches, parsed.allow_origins)
        inside = yaml_text(serve_config(plans, WORKERS_FOLDER, front))
        print(yaml_text(*ray_service(plans, files, parsed.image, inside)), end="")
        return 0
    if parsed.format == "json":
        print(json.dumps([plan.describe() for plan in plans], indent=2, default=str))
        return 0
    from deployments.command.summary import plan_table

    print(plan_table(plans))
    return 0


def _serve(parsed: argparse.Namespace) -> int:
    require_keys(key_source(parsed.keys), parsed.insecure, parsed.host)
    allowed_origins(parsed.allow_origins)
    _check(parsed)
    from deployments.command.serve import run
    from deployments.command.summary import ServeArguments

    return run(ServeArguments(**{each.name: getattr(parsed, each.name) for each in fields(ServeArguments)}))


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{port} isn't a port")
    return port


def _count_or_auto(text: str) -> int:
    """Return a number of processes; 0 for `auto`."""
    return 0 if text == "auto" else positive(text)


if __name__ == "__main__":
    sys.exit(main())
