"""`embedding-cluster embed`: a file of texts in, a file of vectors out, over a running cluster's replicas."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import EmbeddingError, JobError
from deployments.machine import cores_here
from deployments.priority import in_background

if TYPE_CHECKING:
    from deployments.jobs.rows import Source
    from deployments.jobs.run import Client, Job

DESCRIPTION = """\
Embed a column of Parquet, Arrow, CSV or JSON lines (a file, or a folder of them) into .parquet, .npy or
.lance. Rows that can't be embedded are told with their reason in OUTPUT.errors.jsonl. Until OUTPUT is there
whole, the work is kept in OUTPUT.parts. Runs on any node of the cluster, or by `ray job submit`."""


def add_embed_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `embed` to the command line."""
    what = "embed a file's texts on a running cluster"
    embed = commands.add_parser("embed", help=what, description=DESCRIPTION)
    embed.add_argument("input", type=Path, help="a file, or a folder of files of one format")
    embed.add_argument("output", type=Path, help="its name ends in .parquet, .npy or .lance")
    embed.add_argument("--model", required=True, help="a public model name")
    embed.add_argument("--column", default="text", help="the input's column of texts (default: %(default)s)")
    embed.add_argument("--keep", nargs="*", metavar="COLUMN", help="columns to copy (default: all)")
    embed.add_argument("--output-column", default="embedding", help="default: %(default)s")
    embed.add_argument("--dimensions", type=int, help="shorter vectors, where the model allows it")
    embed.add_argument("--input-type", help="the model's prompt to put before each text: query, document, …")
    embed.add_argument(
        "--truncation", choices=("none", "start", "end"), help="what is dropped of a text that is too long"
    )
    what = "embed only the first N rows: a trial"
    embed.add_argument("--limit", type=positive, metavar="N", help=what)
    what = "embed nothing: read all rows and print those that would be refused, a JSON object on each line"
    embed.add_argument("--dry-run", action="store_true", help=what)
    embed.add_argument("--resume", action="store_true", help="go on where a run was ended, or begin")
    embed.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    embed.add_argument(
        "--part-rows", type=positive, default=8192, help="rows that a kill may cost (default: %(default)s)"
    )
    embed.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for a model that is away (default: 600)"
    )
    embed.add_argument(
        "--address",
        help="the cluster's, as `embedding-cluster serve` prints it (default: $RAY_ADDRESS, or what is here)",
    )
    embed.set_defaults(command=_embed)


def _embed(parsed: argparse.Namespace) -> int:
    try:
        return _run(parsed)
    except EmbeddingError as error:
        print(error.message, file=sys.stderr)
        return 2 if isinstance(error, JobError) else 1
    except ConnectionError as error:
        print(f"no Ray cluster answers: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no room on the disk, a folder that nobody may write to
        print(f"{error}; --resume goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return 130


def _run(parsed: argparse.Namespace) -> int:
    try:
        import pyarrow as pa

        from deployments.jobs.run import Job, check
        from deployments.jobs.source import open_source
    except ModuleNotFoundError as error:
        raise JobError(f"{error.name} is missing: pip install 'embedding-cluster[data]'") from None
    from deployments.bulk.connection import How
    from deployments.jobs.sink import check_format

    pa.set_cpu_count(cores_here())  # by itself it knows of no quota
    check_format(parsed.output)
    source = open_source(parsed.input, parsed.column, parsed.keep, parsed.limit)
    how = How(
        dimensions=parsed.dimensions,
        input_type=parsed.input_type,
        truncation=parsed.truncation,
        timeout_s=parsed.timeout,
        dry_run=parsed.dry_run,
    )
    asked = ("output", "column", "output_column", "part_rows", "resume", "overwrite")
    job = Job(source=parsed.input, how=how, **{name: getattr(parsed, name) for name in asked})
    check(job, source)  # before anybody waits for a model
    in_background()  # a part of the job's work is on the replicas' machine
    return _rehearse(parsed, job, source) if parsed.dry_run else _do(parsed, job, source)


def _do(parsed: argparse.Namespace, job: "Job", source: "Source") -> int:
    """Embed."""
    from deployments.jobs.progress import progress
    from deployments.jobs.run import run
    from deployments.jobs.sink import errors_of

    client = _client(parsed, job)
    with contextlib.closing(progress(source.rows)) as told:
        record = run(job, source, client, told)
    print(f"{parsed.output}: {record['embedded']:,} vectors, {record['tokens']:,} tokens", file=sys.stderr)
    if record["errors"]:
        print(
            f"{errors_of(parsed.output)}: {record['errors']:,} rows that have none, and why", file=sys.stderr
        )
    return 0


def _rehearse(parsed: argparse.Namespace, job: "Job", source: "Source") -> int:
    """Say what would be refused; without a cluster, what would be whatever the model."""
    from deployments.jobs.progress import progress
    from deployments.jobs.rehearsal import NoClient, rehearse

    client: Client = NoClient()
    try:
        client = _client(parsed, job)
    except ConnectionError:
        print("no Ray cluster answers: texts that are too long aren't found", file=sys.stderr)
    refused = 0
    with contextlib.closing(progress(source.rows)) as told:
        for error in rehearse(job, source, client, told):
            refused += 1
            print(json.dumps(asdict(error)))
    print(f"{parsed.input}: {refused:,} of {source.rows:,} rows would be refused", file=sys.stderr)
    return 0


def _client(parsed: argparse.Namespace, job: "Job") -> "Client":
    """Join the cluster and find the model. Raises ConnectionError where there is no cluster."""
    from deployments.bulk.connections import join
    from deployments.client import EmbeddingClient

    join(parsed.address)
    return EmbeddingClient(parsed.model, **asdict(job.how))


def positive(text: str) -> int:
    """Return a number of at least one. Raises ArgumentTypeError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} isn't a positive number")
    return number
