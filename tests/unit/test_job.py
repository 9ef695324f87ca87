"""Batch jobs without a cluster: what is read, kept, resumed and written. The client is a stand-in."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from deployments.bulk.connection import Attempt, How, mistake
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.engine.tokenizer import TextTokenizer, byte_tokenizer
from deployments.errors import EmbeddingError, JobError
from deployments.jobs.ledger import Ledger
from deployments.jobs.progress import Lines, Progress
from deployments.jobs.run import Job, run
from deployments.jobs.source import open_source

DIMENSION = 8
TOKENIZER = TextTokenizer(byte_tokenizer())


def expected(texts: list[str]) -> np.ndarray:
    """Return the right vectors."""
    return fake_vectors(TokenBatch.of(TOKENIZER.encode(texts)), DIMENSION)


@dataclass
class Client:
    """Gives the fake engine's vectors, and is killed when so many texts are embedded."""

    dies_after: float = float("inf")
    engine_version: str = "e1"
    answers_as: str = "e1"
    model: str = "m"
    version: str = "1"
    dimension: int = DIMENSION
    asked: list[Any] = field(default_factory=list)

    def attempts(self, batches: Iterator[list[Any]], ahead: int) -> Iterator[Attempt]:
        """Embed one batch after the other."""
        for batch in batches:
            self.asked += batch
            if len(self.asked) > self.dies_after:
                raise KeyboardInterrupt
            errors: dict[int, EmbeddingError] = {
                row: error for row, text in enumerate(batch) if (error := mistake(text))
            }
            good = [text for row, text in enumerate(batch) if row not in errors]
            vectors = expected(good) if good else np.empty((0, DIMENSION), np.float32)
            yield Attempt(vectors, errors, sum(map(len, good)), frozenset({self.answers_as}))


class Silent(Progress):
    """Tells nothing."""

    def __init__(self) -> None:
        """Count whatever comes."""
        super().__init__(0)

    def close(self) -> None:
        """Be silent."""


TEXTS: list[str | None] = [f"text {n}" for n in range(100)]
TEXTS[7], TEXTS[42] = None, ""
GOOD = [n for n, text in enumerate(TEXTS) if text]


def write(file: Path) -> Path:
    """Write the texts in the format that the file's name says."""
    table = pa.table({"id": [f"{n}" for n in range(100)], "text": TEXTS, "n": range(100)})
    match file.suffix:
        case ".parquet":
            pa.parquet.write_table(table, file, row_group_size=33)
        case ".arrow":
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=17)
        case ".feather":
            pa.feather.write_feather(table, file)
        case ".csv":
            pa.csv.write_csv(table, file)
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return file


def do(source: Path, output: Path, client: Client | None = None, **more: Any) -> dict[str, Any]:
    """Run a job whose slices have 4 rows."""
    job = Job(source=source, output=output, column="text", how=How(), part_rows=32, **more)
    return run(job, open_source(source, "text"), client or Client(), Silent())


def check_parquet(output: Path) -> pa.Table:
    """Hold that each good row is there once, with its own vector, and each other one among the errors."""
    table = pa.parquet.read_table(output)
    assert table["input_row"].to_pylist() == GOOD
    vectors = np.stack(table["embedding"].to_numpy())
    assert np.array_equal(vectors, expected([TEXTS[n] or "" for n in GOOD]))
    lines = output.with_name(f"{output.name}.errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [7, 42]
    assert all(json.loads(line)["reason"].startswith("the text is") for line in lines)
    return table


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".csv", ".jsonl"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    """Rows, other columns and mistakes are the same."""
    record = do(write(tmp_path / f"in{suffix}"), tmp_path / "out.parquet")
    table = check_parquet(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [f"{n}" for n in GOOD]
    assert table["n"].to_pylist() == ([f"{n}" for n in GOOD] if suffix == ".csv" else GOOD)
    assert (record["embedded"], record["errors"]) == (98, 2)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)
    names = {"out.parquet", "out.parquet.errors.jsonl", "out.parquet.manifest.json", f"in{suffix}"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_folder_of_files_is_one_input(tmp_path: Path) -> None:
    """In the order of their names."""
    folder = tmp_path / "in"
    folder.mkdir()
    whole = pa.parquet.read_table(write(tmp_path / "all.parquet"))
    for number, begin in enumerate((0, 30, 61)):
        pa.parquet.write_table(whole.slice(begin, (30, 31, 39)[number]), folder / f"{number}.parquet")
    do(folder, tmp_path / "out.parquet")
    check_parquet(tmp_path / "out.parquet")


def test_npy_has_a_row_for_each_of_the_inputs(tmp_path: Path) -> None:
    """NaN where there is an error."""
    do(write(tmp_path / "in.parquet"), tmp_path / "out.npy")
    vectors = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert vectors.shape == (100, DIMENSION)
    assert vectors.dtype == np.float32
    assert np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist() == [7, 42]
    assert np.array_equal(vectors[GOOD], expected([TEXTS[n] or "" for n in GOOD]))


def test_lance_holds_the_same_table(tmp_path: Path) -> None:
    """A dataset that the library opens."""
    lance = pytest.importorskip("lance")
    do(write(tmp_path / "in.parquet"), tmp_path / "out.lance")
    table = lance.dataset(str(tmp_path / "out.lance")).to_table()
    assert table["input_row"].to_pylist() == GOOD
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), expected([TEXTS[n] or "" for n in GOOD]))


def test_lines_that_are_no_objects_are_errors(tmp_path: Path) -> None:
    """Each with its reason; columns that come later are columns of all rows."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n{"text": 3}\n{"text": "b", "late": 1.5}\n')
    record = do(file, tmp_path / "out.parquet")
    table = pa.parquet.read_table(tmp_path / "out.parquet")
    assert table.select(["input_row", "text", "late"]).to_pylist() == [
        {"input_row": 0, "text": "a", "late": None},
        {"input_row": 4, "text": "b", "late": 1.5},
    ]
    assert record["errors"] == 3


@pytest.mark.parametrize("dies_after", [1, 5, 33, 64, 99])
def test_a_killed_job_goes_on(tmp_path: Path, dies_after: int) -> None:
    """No row twice, none missing; at most a part is embedded again, and nothing shows until all is done."""
    source, output = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    first, second = Client(dies_after), Client()
    with pytest.raises(KeyboardInterrupt):
        do(source, output, first)
    assert not output.exists()
    with pytest.raises(JobError, match="unfinished"):
        do(source, output)
    do(source, output, second, resume=True)
    check_parquet(output)
    assert 100 <= len(first.asked) + len(second.asked) <= 100 + 32
    third = Client()
    do(source, output, third, resume=True)  # it is done, and says so
    assert not third.asked


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".lance"])
@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_the_output_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, step: int
) -> None:
    """Whatever the last step was, the next run ends the job without embedding anything."""
    from deployments.jobs import sink

    source, output = write(tmp_path / "in.parquet"), tmp_path / f"out{suffix}"
    steps = [(sink, "write_whole"), (sink, "_write_errors"), (sink, "settle_folder"), (Ledger, "remove")]

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*steps[step], die)
        with pytest.raises(KeyboardInterrupt):
            do(source, output)
    client = Client()
    record = do(source, output, client, resume=True)
    assert not client.asked
    assert record["embedded"] == 98
    assert not (tmp_path / f"out{suffix}.parts").exists()
    assert output.exists()


def test_an_output_is_never_replaced_unasked(tmp_path: Path) -> None:
    """Neither at the start nor at the end, nor by --resume; with --overwrite it is."""
    source, output = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    output.write_text("precious")
    for resume in (False, True):
        with pytest.raises(JobError, match="is there already"):
            do(source, output, resume=resume)
    assert output.read_text() == "precious"
    output.unlink()
    client = Client(50)
    with pytest.raises(KeyboardInterrupt):
        do(source, output, client)
    output.write_text("precious")
    with pytest.raises(JobError, match="appeared"):
        do(source, output, resume=True)
    assert output.read_text() == "precious"
    do(source, output, overwrite=True)
    check_parquet(output)


def test_only_the_same_job_is_resumed(tmp_path: Path) -> None:
    """Another input, model or column is another job."""
    source, output = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        do(source, output, Client(50))
    with pytest.raises(JobError, match="engine_version was e1, not e2"):
        do(source, output, Client(engine_version="e2"), resume=True)
    write(source)
    with pytest.raises(JobError, match="its input has changed"):
        do(source, output, resume=True)


def test_a_model_that_changes_ends_the_job(tmp_path: Path) -> None:
    """An output never holds the vectors of two."""
    with pytest.raises(JobError, match="another model"):
        do(write(tmp_path / "in.parquet"), tmp_path / "out.parquet", Client(answers_as="e2"))


def test_two_processes_dont_do_one_job(tmp_path: Path) -> None:
    """The second one is told so."""
    output = tmp_path / "out.parquet"
    ledger = Ledger(output, {}, resume=False, overwrite=False)
    with pytest.raises(JobError, match="another process"):
        Ledger(output, {}, resume=True, overwrite=False)
    ledger.close()
    Ledger(output, {}, resume=True, overwrite=False).close()


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("in.txt", "x", "text", "must all end in"),
        ("in.jsonl", '{"a": 1}\n', "text", "no column `text`; there are `a`"),
        ("in.csv", "text\na,b\n", "text", "in.csv: "),
        ("in.parquet", "x", "text", "can't be read"),
        (
            "in.jsonl",
            '{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n',
            "text",
            "`n` holds values of several",
        ),
    ],
)
def test_what_cant_be_read_is_told(
    tmp_path: Path, name: str, content: str, column: str, message: str
) -> None:
    """In one line that names the file or column."""
    (tmp_path / name).write_text(content)
    with pytest.raises(JobError, match=message):
        list(open_source(tmp_path / name, column).slices(4))


def test_lines_tell_rows_speed_and_time_left() -> None:
    """Earlier runs count for the rows and the cost, not for the speed."""
    out, now = io.StringIO(), 0.0
    lines = Lines(1000, out, lambda: now)
    lines.resumed(500, 5000)
    now = 5.0
    lines.done(100, 1000)
    now = 10.0
    lines.done(150, 1500)
    assert out.getvalue().splitlines() == [
        "going on after 500 rows",
        "750 of 1,000 rows, 250 tokens/s, 7,500 tokens, 10 s left",
    ]


def test_a_slice_that_is_half_written_is_none(tmp_path: Path) -> None:
    """A draft that a kill left is written anew."""
    source, output = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        do(source, output, Client(50))
    (tmp_path / "out.parquet.parts" / "slice-000000020.draft").write_bytes(b"half")
    do(source, output, resume=True)
    check_parquet(output)


def test_keeping_no_column_leaves_row_and_vector(tmp_path: Path) -> None:
    """`--keep` without a name."""
    source = write(tmp_path / "in.parquet")
    job = Job(source=source, output=tmp_path / "out.parquet", column="text", how=How())
    run(replace(job, part_rows=16), open_source(source, "text", []), Client(), Silent())
    assert pa.parquet.read_schema(tmp_path / "out.parquet").names == ["input_row", "embedding"]


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".lance"])
@pytest.mark.parametrize("rows", [0, 9])
def test_an_output_without_a_vector(tmp_path: Path, suffix: str, rows: int) -> None:
    """Of no rows, or of none that can be embedded."""
    table = pa.table({"text": pa.array([""] * rows, pa.string())})
    pa.parquet.write_table(table, tmp_path / "in.parquet")
    record = do(tmp_path / "in.parquet", tmp_path / f"out{suffix}")
    assert (record["embedded"], record["errors"]) == (0, rows)
    assert (tmp_path / f"out{suffix}").exists()
    if suffix == ".npy":
        assert np.load(tmp_path / "out.npy").shape == (rows, DIMENSION)
