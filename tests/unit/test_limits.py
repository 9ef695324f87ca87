"""The page of limits says what the code does: each number on it is that of its constant."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.api.batches import upload
from deployments.api.batches.schema import WINDOW_SECONDS
from deployments.app import BuildArguments
from deployments.batches import run, runner, storage, validation
from deployments.bulk import connection
from deployments.command import embed
from deployments.config.worker import Limits
from deployments.dispatch import admission, meter, prepare, work
from deployments.http import serving as requests
from deployments.http.dialects import tei
from deployments.http.edge import bodies
from deployments.jobs import columns, lines
from deployments.jobs.run import PART_ROWS, SLICES_PER_PART
from deployments.transport import outcome

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "limits.md").read_text()
MIB, GIB = 2**20, 2**30
LIMITS = Limits()
BUILD = BuildArguments(config="x")
CALLER_SHARE = {8: "eight ninths"}


@pytest.mark.parametrize(
    ("what", "bound"),
    [
        ("its body", f"{BUILD.max_body_bytes // MIB} MiB"),
        ("the time until its body is there", f"{bodies.BODY_SECONDS:.0f} s"),
        ("its time in all", f"{LIMITS.request_timeout_s:.0f} s"),
        ("values in its JSON", f"and {requests.OTHER_VALUES} more"),
        ("inputs", f"{LIMITS.max_inputs}"),
        ("tokens of all inputs", f"{LIMITS.max_request_tokens}"),
        ("characters of a text", f"{prepare.GROUP_CHARACTERS}, or {prepare.CHARACTERS_PER_TOKEN} for each"),
        ("times it is tried with an engine that ends", f"{outcome.MAX_CRASHES}"),
        (
            "bytes of bodies and of unread answers in hand, of one ingress replica",
            f"{bodies.LARGEST_BODIES} of the largest:"
            f" {bodies.LARGEST_BODIES * BUILD.max_body_bytes // MIB} MiB;"
            f" one more for those up to {bodies.SMALL_BYTES // 2**10} KiB",
        ),
        ("requests under way, of one ingress replica", f"{tei.MAX_INGRESS_REQUESTS}"),
        ("tokens that wait for a model", f"{admission.FIRST_BOUND_TOKENS} until that is known"),
        ("what one caller has of these", CALLER_SHARE[int(admission.CALLER_SHARE)]),
        ("inputs of one call to a replica", f"{work.MAX_CALL_INPUTS}"),
        ("tokens of one call to a replica", f"{meter.MAX_PART_TOKENS}"),
        ("threads for files and batches, of one process", f"{storage._threads._max_workers}"),
        ("a file", f"{BUILD.max_file_bytes // MIB} MiB"),
        ("time without a byte of it", f"{bodies.BODY_SECONDS:.0f} s"),
        ("fields of its form, and bytes of each", f"{upload.MAX_FIELDS} and {upload.MAX_FIELD_BYTES}"),
        ("files of a key, what batches gave included", f"{BUILD.max_key_files}"),
        ("bytes of a key's files, what batches gave included", f"{BUILD.max_key_bytes // GIB} GiB"),
        ("batches of a key that aren't done", f"{BUILD.max_key_batches}"),
        ("lines, and inputs, of a batch", f"{validation.MAX_LINES}"),
        ("a line", f"{validation.MAX_LINE_BYTES // MIB} MiB"),
        ("time of a batch", f"{timedelta(seconds=WINDOW_SECONDS) // timedelta(hours=1)} hours"),
        ("batches at work", f"{runner.MAX_RUNNING}, and one of each"),
        (
            "of a batch in memory",
            f"{run.BLOCKS_AT_ONCE} blocks of {validation.BLOCK_LINES} lines, {validation.BLOCK_INPUTS}"
            f" inputs or {validation.BLOCK_BYTES // MIB} MiB",
        ),
        ("how long files and batches are kept", f"{BUILD.batch_days} days"),
        ("a line of JSON", f"{lines.MAX_LINE_BYTES // MIB} MiB"),
        ("a row of CSV", f"{columns.MAX_CSV_ROW_BYTES // MIB} MiB"),
        ("rows read and not yet written", f"{SLICES_PER_PART} slices"),
        ("rows read and not yet written", f"of a part ({PART_ROWS} rows)"),
        ("tokens under way", f"{connection.WINDOW_CHUNKS} times"),
    ],
)
def test_the_page_of_limits_says_what_the_code_does(what: str, bound: str) -> None:
    """A bound that changes has to change there."""
    row = re.search(rf"^\| {re.escape(what)} \| (.*?) \|", PAGE, re.MULTILINE)
    assert row, what
    assert bound in row[1]


def test_settings_of_limits_are_settings() -> None:
    """Each that the page names exists."""
    arguments = set(re.findall(r"`(\w+)=`", PAGE)) - {"name"}
    assert arguments <= set(BuildArguments.model_fields)
    assert {name for name in BuildArguments.model_fields if name.startswith("max_")} <= arguments
    named = set(re.findall(r"`\[limits\] (\w+)`", PAGE))
    assert named == set(Limits.model_fields)
    text = Path(str(embed.__file__)).read_text() + (ROOT / "deployments/command/keys.py").read_text()
    options: list[Any] = re.findall(r"`(?:keys create )?(--[\w-]+)", PAGE)
    assert options
    assert all(f'"{option}"' in text for option in options)


def test_the_readme_leads_to_it() -> None:
    """Else nobody finds it."""
    assert "(docs/limits.md)" in (ROOT / "README.md").read_text()
