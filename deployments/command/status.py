"""`embedding-cluster status`: each model's last minutes as a table, and what isn't well with what to do."""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from deployments.command.dashboard import address
from deployments.command.summary import columns
from deployments.errors import ConfigError

KEY_VARIABLE = "EMBEDDING_CLUSTER_KEY"
WELL, NOT_WELL, SILENT = 0, 1, 2
WATCH_SECONDS = 2.0
ASK_SECONDS = 15.0
# To the upper left corner, and nothing from there on.
CLEAR = "\x1b[H\x1b[J"
# What a terminal would take for a command: an address may be a stranger's.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
DESCRIPTION = """\
Show what each model does: replicas, tokens per second and what they can do, what waits, latency, and errors
of the last quarter of an hour. Exit status: 0 where all is well, 1 where something isn't, 2 where the cluster
can't be asked."""
HEADINGS = [
    "MODEL",
    "ENGINE",
    "VERSION",
    "REPLICAS",
    "TOKENS/S",
    "OF",
    "WAITING",
    "P50",
    "P99",
    "REQUESTS",
    "ERRORS",
]


def add_status_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `status` to the command line."""
    status = commands.add_parser("status", help="show what each model does now", description=DESCRIPTION)
    default = "http://127.0.0.1:8000"
    what = "the cluster's address (default: %(default)s)"
    status.add_argument("url", nargs="?", type=address, default=default, metavar="URL", help=what)
    status.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    what = f"a file that holds a key (default: ${KEY_VARIABLE})"
    status.add_argument("--key-file", type=Path, metavar="FILE", help=what)
    status.set_defaults(command=_status)


def _status(parsed: argparse.Namespace) -> int:
    headers = {"authorization": f"Bearer {key}"} if (key := _key(parsed.key_file)) else {}
    status = SILENT
    with httpx.Client(headers=headers, timeout=ASK_SECONDS, follow_redirects=False) as client:
        try:
            while True:
                status = _show(client, parsed.url, CLEAR if parsed.watch and sys.stdout.isatty() else "")
                if not parsed.watch:
                    return status
                time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            return status


def _key(file: Path | None) -> str:
    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {getattr(error, 'strerror', 'no text')}") from None


def _show(client: httpx.Client, url: str, before: str) -> int:
    """Ask once, print what there is; return the exit status."""
    try:
        told = ask(client, url)
    except ConnectionError as error:
        print(f"{before}{url}: {plain(str(error))}", file=sys.stderr, flush=True)
        return SILENT
    print(before + "\n".join(lines(told)), flush=True)
    return WELL if told["ready"] and not told["problems"] else NOT_WELL


def ask(client: httpx.Client, url: str) -> dict[str, Any]:
    """Return what `/status` tells. Raises ConnectionError that says why nothing is told."""
    try:
        answer = client.get(f"{url.rstrip('/')}/status")
        content = answer.json()
    except httpx.HTTPError as error:
        raise ConnectionError(str(error) or type(error).__name__) from None
    except ValueError:
        content = None
    if isinstance(content, dict):
        if answer.is_success and content.get("object") == "status":
            return content
        if isinstance(told := content.get("error"), dict) and "message" in told:
            raise ConnectionError(f"{answer.status_code}: {told['message']}")
    raise ConnectionError(f"answers with {answer.status_code}: no embedding cluster, or an older one")


def lines(told: dict[str, Any]) -> list[str]:
    """Return what is printed: what isn't well first, then a line for each model."""
    problems = []
    for problem in told["problems"]:
        problems += [f"{problem['deployment']}: {problem['what']}", f"    {problem['action']}"]
    if problems:
        problems.append("")
    rows = [HEADINGS, *(_row(model) for model in told["models"])]
    of_no_model = [f"of no model: {_counts(told['errors'])}"] if told.get("errors") else []
    return [plain(line) for line in [*problems, *columns(rows), *of_no_model]]


def _row(model: dict[str, Any]) -> list[str]:
    return [
        " ".join(model["models"]),
        model["engine"],
        str(model["version"]),
        _counts(model["replicas"]) or ("ready" if model["ready"] else "none"),
        f"{model['tokens_per_second']:,.0f}",
        f"{capacity:,}" if (capacity := model["capacity_tokens_per_second"]) else "-",
        f"{model['queued_tokens']:,}",
        _milliseconds(model["p50_seconds"]),
        _milliseconds(model["p99_seconds"]),
        f"{model['requests']:,}",
        _counts(model["errors"]) or "-",
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds is not None else "-"


def plain(text: str) -> str:
    """Return a text without what a terminal would do."""
    return CONTROL.sub("�", text)
