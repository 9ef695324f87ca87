"""What programs write into files, and where they put them: each row comes out once, here or there."""

import gzip
import json
import os
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import pytest

from deployments.__main__ import main
from deployments.bulk import connections
from deployments.bulk.connection import How
from deployments.command import embed
from deployments.errors import JobError
from deployments.jobs import columns, kinds, lines
from deployments.jobs.run import Job, run
from deployments.jobs.source import open_source
from deployments.machine import cores_here
from tests.unit.test_job import Client, Silent, expected

Refused = dict[int, str]


def rows_of(
    source: Path, keep: list[str] | None = None, limit: int | None = None
) -> tuple[pa.Table, Refused]:
    """Embed; hold that each row came out once, with its own vector. Return the output and the reasons."""
    output = source.parent / f"{source.name}-{limit}.parquet"
    opened = open_source(source, "text", keep, limit)
    job = Job(source=source, output=output, column="text", how=How(), part_rows=32)
    record = run(job, opened, Client(), Silent())
    table = pa.parquet.read_table(output, partitioning=None)
    refused: Refused = {}
    errors = output.with_name(f"{output.name}.errors.jsonl")
    for line in errors.read_text().splitlines() if record["errors"] else []:
        error = json.loads(line)
        assert error["row"] not in refused
        refused[error["row"]] = error["reason"]
        assert opened.place(error["row"])[1] == error["row_in_file"]
        assert opened.place(error["row"])[0].name == error["file"]
    assert sorted([*table["input_row"].to_pylist(), *refused]) == list(range(opened.rows))
    if "text" in table.column_names and len(table):
        vectors = np.stack(table["embedding"].to_numpy())
        assert np.array_equal(vectors, expected(table["text"].to_pylist()))
    return table, refused


def assert_read(file: Path, content: bytes, texts: list[str], refused: Refused) -> None:
    """Assert what is read out of a file of these bytes, and what is refused."""
    file.write_bytes(content)
    table, told = rows_of(file)
    assert table["text"].to_pylist() == texts
    assert told == refused


def refusal(source: Path, keep: list[str] | None = None, output: str = "out.parquet") -> str:
    """Return why a job is refused, which it must be before anything is embedded, in one line."""
    client = Client()
    with pytest.raises(JobError) as told:
        job = Job(source=source, output=source.parent / output, column="text", how=How())
        run(job, open_source(source, "text", keep), client, Silent())
    assert not client.asked
    assert "\n" not in told.value.message
    assert told.value.message.startswith(str(source.parent))
    return told.value.message.replace(f"{source.parent}/", "")


# --- JSON lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "texts", "refused"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', ["a", "b"], {}),
        (b'\n{"text": "a"}\n\n  \r\n{"text": "b"}\n\n', ["a", "b"], {}),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], {}),
        (b'{"text": "a", "n": NaN}\n{"text": "b", "n": -Infinity}', ["a", "b"], {}),
        (b'{"text": "a", "title": NaN}\n{"text": "b", "title": "t"}', ["a", "b"], {}),
        ('{"text": "ä"}\r\n\r\n{"text": "b"}\r\n'.encode("utf-16"), ["ä", "b"], {}),
        (
            '{"text": "a"}\n{"text": "\ud83d"}\n{"text": "b"}'.encode("utf-16", "surrogatepass"),
            ["a", "b"],
            {1: "the line isn't UTF-8"},
        ),
        ('{"text": "a\u2028b"}\n'.encode(), ["a\u2028b"], {}),
        (b'{"text": "a\xff"}\n{"text": "b"}\n', ["b"], {0: "the line isn't UTF-8"}),
        (b'{"text": NaN}\n{"text": "b"}\n', ["b"], {0: "not a text: float"}),
        (b'{"text": "\\ud800"}\n{"text": "b"}\n', ["b"], {0: "the text isn't valid Unicode"}),
        (
            b'{"text": "a", "t": "\\ud800"}\n{"text": "b", "t": "c"}\n',
            ["b"],
            {0: "column `t` isn't UTF-8"},
        ),
        (
            b'{"text": "a", "\\udc00": 1}\n{"text": "b"}\n',
            ["b"],
            {0: "the name of a column isn't valid Unicode"},
        ),
        (b"[" * 100_000 + b'\n{"text": "b"}\n', ["b"], {0: "the line isn't JSON"}),
        (b'{"n": ' + b"1" * 5000 + b'}\n{"text": "b"}\n', ["b"], {0: "the line isn't JSON"}),
    ],
)
def test_lines_as_other_programs_write_them(
    tmp_path: Path, content: bytes, texts: list[str], refused: Refused
) -> None:
    """Marks, blank lines, other line ends, Python's NaN, PowerShell's UTF-16; one bad line is one error."""
    assert_read(tmp_path / "in.jsonl", content, texts, refused)


def test_a_line_without_end_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never held as a whole."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 32)
    long = b'{"text": "' + b"x" * 100 + b'"}'
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n' + long)
    table, told = rows_of(tmp_path / "in.jsonl")
    assert table["text"].to_pylist() == ["a", "b"]
    assert told == {1: "the line has 32 bytes or more", 3: "the line has 32 bytes or more"}


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([1, 2**64 - 1], pa.uint64()),
        ([2**64 - 1, -1], pa.decimal128(38, 0)),
        ([2**100, 1], pa.decimal128(38, 0)),
        ([*range(9), -5, 2**64 - 1], pa.decimal128(20, 0)),
        ([*range(9), 2**64 - 1, 0, 1, 2], pa.uint64()),
    ],
)
def test_large_ids_are_kept_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int], kind: pa.DataType
) -> None:
    """Never as floats; wherever in the file the large one stands."""
    monkeypatch.setattr(lines, "TYPED_ROWS", 10 if len(ids) > 10 else 10_000)
    rows = [{"text": "a", "id": number} for number in ids]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, told = rows_of(tmp_path / "in.jsonl")
    assert not told
    assert [int(each) for each in table["id"].to_pylist()] == ids
    assert table.schema.field("id").type == kind


def test_an_integer_that_a_later_float_leaves_no_place_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than another number."""
    monkeypatch.setattr(lines, "TYPED_ROWS", 1)
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a", "n": {2**53 + 1}}}\n{{"text": "b", "n": 0.5}}\n')
    table, told = rows_of(tmp_path / "in.jsonl")
    assert table["n"].to_pylist() == [0.5]
    assert told == {
        0: "column `n`, of double: Integer value 9007199254740993 is outside of the range exactly"
        " representable by a IEEE 754 double precision value"
    }


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            '{"text": "a", "metadata": {}}\n{"text": "b", "metadata": {}}',
            "in.jsonl: column `metadata` holds struct<>, which a .parquet can't; name the columns to keep"
            " without it",
        ),
        (
            '{"text": "a", "tags": [{}]}',
            "in.jsonl: column `tags` holds list<item: struct<>>, which a .parquet can't; name the columns to"
            " keep without it",
        ),
        (
            '{"text": "a", "n": 1}\n\n{"text": "b", "n": "x"}',
            "in.jsonl: column `n` holds values of several kinds, which no column can, in row 1: Could not"
            " convert 'x' with type str: tried to convert to int64; name the columns to keep without it",
        ),
        (
            '{"text": "a", "meta": {"id": 1}}\n{"text": "b", "meta": {"id": 18446744073709551615}}',
            "in.jsonl: column `meta` holds values of several kinds, which no column can, in row 1: the number"
            " is too large; name the columns to keep without it",
        ),
        (
            '{"text": "a", "n": 18446744073709551615}\n{"text": "b", "n": 1e400}',
            "in.jsonl: column `n` holds values of several kinds, which no column can, in row 1: the number"
            " is too large; name the columns to keep without it",
        ),
        *(
            (
                f'{{"text": "a", "m": {"[" * depth}1{"]" * depth}}}',
                "in.jsonl: column `m` holds list<item: list<item: list<item: list<item: list<item: list<item:"
                " list<item: list<item: list<item: …, which a .parquet can't; name the columns to keep"
                " without it",
            )
            for depth in (58, 300)  # more than Parquet's readers take, and than the ledger does
        ),
        ('{"a": 1}', "in.jsonl: no column `text`; there are `a`"),
        ('[{"text": "a"}]', "in.jsonl: no line is a JSON object"),
        (
            '{"text": "a", "input_row": 1}',
            "in.jsonl: has a column `input_row` already; name the columns to keep without it",
        ),
    ],
)
def test_columns_that_the_output_cant_hold_are_told_first(tmp_path: Path, content: str, why: str) -> None:
    """With file, column and row; without the column the job can be done."""
    (tmp_path / "in.jsonl").write_text(content)
    assert refusal(tmp_path / "in.jsonl") == why
    if "name the columns" in why:
        assert rows_of(tmp_path / "in.jsonl", ["text"])[1] == {}


def test_a_row_of_empty_objects_is_no_type(tmp_path: Path) -> None:
    """One row says what is in them."""
    (tmp_path / "in.jsonl").write_text('{"text": "a", "m": {}}\n{"text": "b", "m": {"k": 1}}')
    table, _ = rows_of(tmp_path / "in.jsonl")
    assert table["m"].to_pylist() == [{"k": None}, {"k": 1}]


def test_vectors_alone_need_no_place_for_columns(tmp_path: Path) -> None:
    """`.npy`."""
    (tmp_path / "in.jsonl").write_text('{"text": "a", "metadata": {}}')
    job = Job(source=tmp_path / "in.jsonl", output=tmp_path / "o.npy", column="text", how=How())
    run(job, open_source(tmp_path / "in.jsonl", "text"), Client(), Silent())
    assert np.array_equal(np.load(tmp_path / "o.npy"), expected(["a"]))
    (tmp_path / "deep.jsonl").write_text(f'{{"text": "a", "m": {"[" * 64}1{"]" * 64}}}')
    assert refusal(tmp_path / "deep.jsonl", output="deep.npy") == (  # until the end they have one beside them
        "deep.jsonl: column `m` holds list<item: list<item: list<item: list<item: list<item: list<item: list<"
        "item: list<item: list<item: …, which a .npy can't; name the columns to keep without it"
    )


# --- Arrow and Parquet -------------------------------------------------------------------------------


def unchecked(values: list[bytes]) -> pa.Array:
    """Return bytes as a column that says it is text."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values).buffers())


BAD = unchecked([b"a", b"\xff\xfe", b"c"])
DICTIONARY = pa.DictionaryArray.from_arrays(pa.array([2, 1, 0], pa.int8()), BAD)
TAGS = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), BAD)


@pytest.mark.parametrize(
    ("suffix", "table", "reason"),
    [
        (".parquet", {"text": BAD}, "the text isn't UTF-8"),
        (".arrow", {"text": DICTIONARY}, "the text isn't UTF-8"),
        (".parquet", {"text": ["a", "b", "c"], "title": BAD}, "column `title` isn't UTF-8"),
        (".arrow", {"text": ["a", "b", "c"], "title": DICTIONARY}, "column `title` isn't UTF-8"),
        (".parquet", {"text": ["a", "b", "c"], "tags": TAGS}, "column `tags` isn't UTF-8"),
    ],
)
def test_bytes_that_arent_utf8_are_one_rows_error(
    tmp_path: Path, suffix: str, table: dict[str, Any], reason: str
) -> None:
    """In the text, in another column, deep in one."""
    write(pa.table(table), tmp_path / f"in{suffix}")
    found, told = rows_of(tmp_path / f"in{suffix}")
    assert told == {1: reason}
    assert found["input_row"].to_pylist() == [0, 2]


def write(table: pa.Table, file: Path) -> None:
    """Write what the file's name says; an `.arrow` as a stream, as Hugging Face does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pa.parquet.write_table(table, file)
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


VIEW = pa.list_view(pa.int64())
AB = pa.struct({"a": pa.int64(), "b": pa.string()})
TEXT = pa.array(["a", None, "b", "a"])
TYPES: dict[str, Callable[[], pa.Array]] = {
    "string_view": lambda: TEXT.cast(pa.string_view()),
    "large_string": lambda: TEXT.cast(pa.large_string()),
    "dictionary": TEXT.dictionary_encode,
    "runs": lambda: pa.compute.run_end_encode(TEXT),
    "null": lambda: pa.nulls(4),
    # polars' Categorical
    "dictionary of views": lambda: pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1, 0], pa.uint32()), pa.array(["a", "b"], pa.string_view())
    ),
}


def in_lists(values: pa.Array) -> pa.Array:
    """Return a list of all values."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


@pytest.mark.parametrize("name", TYPES)
def test_text_is_text_in_whatever_type(tmp_path: Path, name: str) -> None:
    """Also where it is kept, and as another column than the text."""
    column = TYPES[name]()
    write(pa.table({"text": column, "title": column, "n": range(4)}), tmp_path / "in.arrow")
    table, told = rows_of(tmp_path / "in.arrow")
    if name == "null":
        assert told == dict.fromkeys(range(4), "the text is missing")
    else:
        assert told == {1: "the text is missing"}
        assert table.select(["text", "title", "n"]).to_pylist() == [
            {"text": text, "title": text, "n": n} for text, n in (("a", 0), ("b", 2), ("a", 3))
        ]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.nulls(1), pa.array(["x"]), pa.string()),
        (pa.array([1]), pa.array([2**64 - 1], pa.uint64()), pa.decimal128(20, 0)),
        (pa.array([1], pa.int8()), pa.array([2**40]), pa.int64()),
        (pa.array(["x"]).dictionary_encode(), pa.array(["y"]).dictionary_encode(), pa.string()),
        (pa.array([["x"]]), pa.array([["y"]], pa.large_list(pa.string())), pa.large_list(pa.string())),
        (
            pa.array([{"a": 1}]),
            pa.array([{"a": 2, "b": "x"}]),
            pa.struct({"a": pa.int64(), "b": pa.string()}),
        ),
        (
            pa.array([[{"a": ["x"]}]]),
            pa.array([[{"a": ["y"]}]]),
            pa.list_(pa.struct({"a": pa.list_(pa.string())})),
        ),
        (
            pa.array([[]], pa.list_(pa.int8(), 0)),
            pa.array([None], pa.list_(pa.int8(), 0)),
            pa.list_(pa.int8()),
        ),
        (pa.array([1], pa.timestamp("us")), pa.array([2], pa.timestamp("ns")), pa.timestamp("ns")),
        (pa.array([Decimal("1.25")]), pa.array([2**62]), pa.decimal128(22, 2)),
        (pa.array([5], pa.uint8()), pa.array([Decimal("0.5")], pa.decimal128(38, 37)), pa.decimal256(57, 37)),
        (in_lists(TYPES["dictionary of views"]()), in_lists(TYPES["runs"]()), pa.list_(pa.string())),
    ],
)
def test_a_column_holds_what_it_has_in_all_files(
    tmp_path: Path, first: pa.Array, second: pa.Array, kind: pa.DataType
) -> None:
    """A first file whose column is all null decides nothing."""
    write(pa.table({"text": ["a"], "c": first}), tmp_path / "in" / "0.arrow")
    write(pa.table({"text": ["b"], "c": second}), tmp_path / "in" / "1.arrow")
    table, told = rows_of(tmp_path / "in")
    assert not told
    assert table.schema.field("c").type == kind
    assert len(table) == 2


def test_sparks_old_timestamps_keep_their_year(tmp_path: Path) -> None:
    """9999, as warehouses write "for ever", which nanoseconds of 64 bits can't hold."""
    forever = datetime(9999, 12, 31)
    table = pa.table({"text": ["a"], "until": pa.array([forever], pa.timestamp("us"))})
    pa.parquet.write_table(table, tmp_path / "in.parquet", use_deprecated_int96_timestamps=True)
    found, _ = rows_of(tmp_path / "in.parquet")
    assert found["until"].to_pylist() == [forever]


def test_a_first_file_whose_texts_are_all_null(tmp_path: Path) -> None:
    """It has rows without a text, and says nothing of the other files."""
    write(pa.table({"text": pa.nulls(2)}), tmp_path / "in" / "0.parquet")
    write(pa.table({"text": ["a"], "late": [1.5]}), tmp_path / "in" / "1.parquet")
    table, told = rows_of(tmp_path / "in")
    assert told == {0: "the text is missing", 1: "the text is missing"}
    assert table.select(["text", "late"]).to_pylist() == [{"text": "a", "late": 1.5}]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (
            pa.table([["a"], ["b"], [1]], ["text", "text", "n"]),
            "in.arrow: has several columns `text`",
        ),
        (
            pa.table([["a"], [1], [2]], ["text", "n", "n"]),
            "in.arrow: has several columns `n`; name the columns to keep without it",
        ),
        (pa.table({"text": [1]}), "in.arrow: column `text` holds int64, not text"),
        (pa.table({"text": [["a"]]}), "in.arrow: column `text` holds list<item: string>, not text"),
        (
            pa.table({"text": ["a"], "i": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}),
            "in.arrow: column `i` holds month_day_nano_interval, which a .parquet can't; name the columns to"
            " keep without it",
        ),
    ],
)
def test_types_that_cant_be_are_told_first(tmp_path: Path, table: pa.Table, why: str) -> None:
    """By file and column."""
    write(table, tmp_path / "in.arrow")
    assert refusal(tmp_path / "in.arrow") == why


@pytest.mark.parametrize(
    ("table", "column"),
    [
        (pa.table({"text": ["a"], "": [1]}), "column `` holds int64"),
        (pa.table({"text": ["a"], "v": pa.nulls(1, VIEW)}), "column `v` holds list_view<item: int64>"),
    ],
)
def test_lance_has_columns_of_its_own_that_cant_be(tmp_path: Path, table: pa.Table, column: str) -> None:
    """An index as pandas writes it, which Lance would write and never read."""
    pytest.importorskip("lance")
    write(table, tmp_path / "in.arrow")
    why = f"in.arrow: {column}, which a .lance can't; name the columns to keep without it"
    assert refusal(tmp_path / "in.arrow", output="out.lance") == why


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.list_(pa.int64()), [[1], {"a": 1}, None, [2]]),
        (pa.struct([("a", pa.list_(pa.int64()))]), [{"a": [1]}, 3, {"a": None}, {"a": [2]}]),
        (pa.struct([("a", pa.struct([("b", pa.int64())]))]), [{"a": {"b": 1}}, {"a": 3}, {"a": None}, None]),
    ],
)
def test_a_value_that_its_nested_column_cant_hold_is_one_rows_error(
    kind: pa.DataType, values: list[Any]
) -> None:
    """Beside others that are null, or hold one: of lists and objects, in one another."""
    column, faults = kinds.built(values, pa.field("id", kind))
    assert column.type == kind
    assert column.to_pylist() == [None if row == 1 else value for row, value in enumerate(values)]
    assert list(faults) == [1]
    assert faults[1].message.startswith(f"column `id`, of {kind}: ")


def test_a_number_too_many_for_its_column_is_one_rows_error(tmp_path: Path) -> None:
    """Where two files agree on a type that can't hold every value of both."""
    write(pa.table({"text": ["a"], "t": pa.array([0.5])}), tmp_path / "in" / "0.parquet")
    write(pa.table({"text": ["b", "c"], "t": [2**53 + 1, 2]}), tmp_path / "in" / "1.parquet")
    table, told = rows_of(tmp_path / "in")
    assert table["t"].to_pylist() == [0.5, 2.0]
    assert told == {
        1: "column `t`, of double: Integer value 9007199254740993 not in range: -9007199254740992 to"
        " 9007199254740992"
    }


def test_dictionaries_in_lists_of_several_row_groups(tmp_path: Path) -> None:
    """Each row group has its own, and a batch may reach over two."""
    tags = pa.array([[f"tag {n // 3}"] for n in range(200)]).cast(pa.list_(pa.string()))
    kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    lists = pa.ListArray.from_arrays(tags.offsets, tags.values.dictionary_encode()).cast(kind)
    table = pa.table({"text": [f"text {n}" for n in range(200)], "tags": lists})
    pa.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=70)
    table, told = rows_of(tmp_path / "in.parquet")
    assert not told
    assert table["tags"].to_pylist() == tags.to_pylist()


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (pa.date64(), 86_400_007, "date64[ms] 86400007 does not represent a whole number of days"),
        (pa.time32("s"), 86_400, "time32[s] 86400 is not within the acceptable range of [0, 86400) s"),
        (pa.decimal128(3, 0), 99_999, "Decimal value 99999 does not fit in precision of decimal128(3, 0)"),
    ],
)
def test_a_value_beyond_its_own_type_is_one_rows_error(
    tmp_path: Path, kind: pa.DataType, value: int, why: str
) -> None:
    """As other writers of Arrow leave them."""
    width = kind.bit_width // 8
    values = pa.py_buffer(b"".join(number.to_bytes(width, "little") for number in (0, value, 0)))
    write(
        pa.table({"text": ["a", "b", "c"], "x": pa.Array.from_buffers(kind, 3, [None, values])}),
        tmp_path / "in.arrow",
    )
    _, told = rows_of(tmp_path / "in.arrow")
    assert list(told) == [1]
    assert why in told[1]


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    """Rows that were counted and aren't there are in neither of the outputs."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a"}\n' * 100)
    source = open_source(file, "text")
    file.write_text('{"text": "a"}\n' * 50)
    with pytest.raises(JobError) as told:
        run(Job(source=file, output=tmp_path / "o.npy", column="text", how=How()), source, Client(), Silent())
    assert told.value.message == f"{file}: has changed since the job began; begin it anew with --overwrite"


def test_a_file_that_breaks_off_is_told_in_one_line(tmp_path: Path) -> None:
    """And what was done until then is kept."""
    write(pa.table({"text": [f"text {n}" for n in range(1000)]}), tmp_path / "whole.parquet")
    content = bytearray((tmp_path / "whole.parquet").read_bytes())
    content[4:400] = bytes(396)
    (tmp_path / "in.parquet").write_bytes(content)
    job = Job(source=tmp_path / "in.parquet", output=tmp_path / "o.parquet", column="text", how=How())
    with pytest.raises(JobError) as told:
        run(job, open_source(tmp_path / "in.parquet", "text"), Client(), Silent())
    assert told.value.message.startswith(f"{tmp_path}/in.parquet: can't be read: ")
    assert "\n" not in told.value.message


def pointing(kind: pa.DataType, place: int) -> pa.Array:
    """Return two values of a type, the second of which begins at a place where there is nothing."""
    offsets = pa.array([0, place, 2], pa.int32()).buffers()[1]
    if kind == pa.string():
        return pa.Array.from_buffers(kind, 2, [None, offsets, pa.py_buffer(b"ab")])
    return pa.Array.from_buffers(kind, 2, [None, offsets], children=[pa.array([1, 2], pa.int64())])


@pytest.mark.parametrize(
    ("column", "kind", "place", "why"),
    [
        ("text", pa.string(), 500_000, "offset for slot 1 out of bounds: 500000 > 2"),
        ("text", pa.string(), -5, "non-monotonic offset at slot 1: -5 < 0"),
        ("n", pa.list_(pa.int64()), 500_000, "offset for slot 1 out of bounds: 500000 > 2"),
    ],
)
def test_a_damaged_arrow_file_ends_no_process(
    tmp_path: Path, column: str, kind: pa.DataType, place: int, why: str
) -> None:
    """What points beyond the file is found before anybody follows it."""
    write(pa.table({"text": ["a", "b"]} | {column: pointing(kind, place)}), tmp_path / "in.arrow")
    assert refusal(tmp_path / "in.arrow") == f"in.arrow: can't be read: Offset invariant failure: {why}"


# --- CSV ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "texts", "refused"),
    [
        (b"text\na\n\nb\n", ["a", "b"], {1: "the text is empty"}),
        (b"text\r\na\r\n\r\n\r\nb", ["a", "b"], {1: "the text is empty", 2: "the text is empty"}),
        (b'text\na\n""\nb\n', ["a", "b"], {1: "the text is empty"}),
        (b"\n\ntext\na\n\nb\n", ["a", "b"], {1: "the text is empty"}),
        (
            b"\xef\xbb\xbf\r\n\r\ntext\r\na\r\nx,y\r\nb\r\n",
            ["a", "b"],
            {1: "the row has 2 columns, not 1"},
        ),
        ("\n\ntext\nä\n\n".encode("utf-16"), ["ä"], {1: "the text is empty"}),
        (b"id,text\n1,a\n\n2,b\n", ["a", "b"], {}),
        (b"\xef\xbb\xbftext,id\na,1\n", ["a"], {}),
        ("text,id\r\nä,1\r\n".encode("utf-16"), ["ä"], {}),
        (
            b"text,id\na\xff,1\nb,2\nc,\xff\n",
            ["b"],
            {0: "the text isn't UTF-8", 2: "column `id` isn't UTF-8"},
        ),
        (
            b'text,id\na,1,2\n"b\nb",2\nc\nd,3\ne\n',
            ["b\nb", "d"],
            {
                0: "the row has 3 columns, not 2",
                2: "the row has 1 columns, not 2",
                4: "the row has 1 columns, not 2",
            },
        ),
    ],
)
def test_csv_as_other_programs_write_it(
    tmp_path: Path, content: bytes, texts: list[str], refused: Refused
) -> None:
    """Empty lines of one column are rows; a row that isn't like the header is one error."""
    assert_read(tmp_path / "in.csv", content, texts, refused)


def test_long_cells_are_read(tmp_path: Path) -> None:
    """2.5 MiB, over several of pyarrow's own blocks."""
    long = "x" * (5 * 2**19)
    (tmp_path / "in.csv").write_text(f'id,text\n1,"{long}"\n2,b\n3,"{long}y"\n')
    table, told = rows_of(tmp_path / "in.csv")
    assert not told
    assert [len(text) for text in table["text"].to_pylist()] == [len(long), 1, len(long) + 1]


def test_a_row_that_no_block_holds_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on what is in memory, said as such."""
    monkeypatch.setattr(columns, "MAX_CSV_ROW_BYTES", 64)
    (tmp_path / "in.csv").write_text("text\n" + "a\n" * 40 + "x" * 200 + "\n")
    assert refusal(tmp_path / "in.csv") == "in.csv: a row after the first 40 is longer than 64 bytes"


def test_bad_rows_keep_their_places_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number belongs to one row, whatever is between."""
    monkeypatch.setattr(columns, "MAX_CSV_ROW_BYTES", 64)
    rows = [f"t{n},{n}" if n % 7 else f"bad{n}" for n in range(100)]
    (tmp_path / "in.csv").write_text("text,id\n" + "\n".join(rows) + "\n")
    table, told = rows_of(tmp_path / "in.csv")
    assert sorted(told) == list(range(0, 100, 7))
    assert [int(n) for n in table["id"].to_pylist()] == table["input_row"].to_pylist()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"text\na,b\n", "in.csv: no row has as many columns as the header"),
        (b"text,n\na,1\n\xff\n", "in.csv: row 1 isn't UTF-8 and has 1 columns, not 2"),
        (
            b"text,\xff\na,1\n",
            "in.csv: can't be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b'"te\nxt"\na\n', "in.csv: no column `text`; there are `te xt`"),
        (b"id;text\n1;a\n", "in.csv: no column `text`; there are `id;text`"),
        (
            b'text,n\na,1\n"say \\"hi, you\\"",2\n',
            "in.csv: line 3 has a quote behind a backslash; write it with quotes doubled, as Spark does with"
            " `escape` set to a quote",
        ),
        (b"text,n,n\na,1,2\n", "in.csv: has several columns `n`; name the columns to keep without it"),
    ],
)
def test_a_csv_that_cant_be_is_told_first(tmp_path: Path, content: bytes, why: str) -> None:
    """In one line."""
    (tmp_path / "in.csv").write_bytes(content)
    assert refusal(tmp_path / "in.csv") == why


# --- folders -----------------------------------------------------------------------------------------


def lay_out(folder: Path, files: dict[str, bytes | pa.Table]) -> Path:
    """Write files into a folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            write(content, file)
    return folder


def one(text: str) -> pa.Table:
    """Return a table of one row."""
    return pa.table({"text": [text]})


NAMED = pa.table({"text": ["a"], "n": ["1"]})
LAYOUTS: dict[str, tuple[dict[str, bytes | pa.Table], list[str]]] = {
    "spark": (
        {
            "_SUCCESS": b"",
            "._SUCCESS.crc": b"\x00",
            "part-00000-1b2c.snappy.parquet": one("a"),
            ".part-00000-1b2c.snappy.parquet.crc": b"\x00",
            "part-00001-1b2c.snappy.parquet": one("b"),
        },
        ["a", "b"],
    ),
    "spark-json": (
        {
            "_SUCCESS": b"",
            "part-00000-1b2c.json": b'{"text":"a"}\n',
            "part-00001-1b2c.json": b"",
            "part-00002-1b2c.json.gz": gzip.compress(b'{"text":"b"}\n'),
            ".part-00000-1b2c.json.crc": b"\x00",
        },
        ["a", "b"],
    ),
    "spark-csv": (
        {
            "_SUCCESS": b"",
            "part-00000.csv": b"text,n\na,1\n",
            "part-00001.csv": b"",
            "part-2.csv": b"text,n\n",
        },
        ["a"],
    ),
    "hugging-face-saved": (
        {
            "train/data-00000-of-00001.arrow": one("b"),
            "train/dataset_info.json": b"{}",
            "train/state.json": b"{}",
            "test/data-00000-of-00001.arrow": one("a"),
            "test/cache-1f.arrow~": b"",
            "test/dataset_info.json": b"{}",
            "test/cache-0123456789abcdef.arrow": one("a"),
            "dataset_dict.json": b"{}",
        },
        ["a", "b"],
    ),
    "hugging-face-hub": (
        {
            "README.md": b"# Data",
            ".gitattributes": b"",
            ".cache/huggingface/download/data/train-0.parquet.metadata": b"",
            ".cache/huggingface/download/data/x.parquet": b"",
            "data/train-00000-of-00002.parquet": one("a"),
            "data/train-00001-of-00002.parquet": one("b"),
        },
        ["a", "b"],
    ),
    "names-with-caches": ({"cache-1.arrow": one("a"), "cache-2.arrow": one("b")}, ["a", "b"]),
    "columns-that-begin-low": ({"a=1/_b=1/0.parquet": one("a"), "a=1/_c/0.parquet": one("b")}, ["a"]),
    "dask": ({"_metadata": b"", "_common_metadata": b"", "part.0.PARQUET": one("a")}, ["a"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_as_programs_lay_them_out(tmp_path: Path, name: str) -> None:
    """What is theirs is passed over."""
    files, texts = LAYOUTS[name]
    if name == "dask":
        pa.parquet.write_table(one("a"), tmp_path / "part")
        files = {**files, "part.0.PARQUET": (tmp_path / "part").read_bytes()}
    table, told = rows_of(lay_out(tmp_path / "in", files))
    assert table["text"].to_pylist() == texts
    assert not told


def test_folders_named_like_columns_are_columns(tmp_path: Path) -> None:
    """As Spark and pandas write partitions: numbers are numbers, escapes are undone, null is null."""
    files: dict[str, bytes | pa.Table] = {
        "year=2024/lang=de/part-0.parquet": one("a"),
        "year=2025/lang=__HIVE_DEFAULT_PARTITION__/part-0.parquet": one("b"),
        "year=2025/lang=a%20b/part-0.parquet": one("c"),
    }
    lay_out(tmp_path / "in", files)
    table, _ = rows_of(tmp_path / "in")
    assert table.select(["text", "year", "lang"]).to_pylist() == [
        {"text": "a", "year": 2024, "lang": "de"},
        {"text": "b", "year": 2025, "lang": None},
        {"text": "c", "year": 2025, "lang": "a b"},
    ]
    table, _ = rows_of(tmp_path / "in", ["lang"], limit=2)
    assert table.column_names == ["input_row", "lang", "embedding"]
    assert table["lang"].to_pylist() == ["de", None]


def test_a_column_of_the_files_stands_before_a_folders_name(tmp_path: Path) -> None:
    """There are not two of one name."""
    lay_out(
        tmp_path / "in", {"n=1/0.parquet": pa.table({"n": [5], "text": ["a"]}), "n=2/1.parquet": one("b")}
    )
    table, _ = rows_of(tmp_path / "in")
    assert table.select(["n", "text"]).to_pylist() == [{"n": 5, "text": "a"}, {"n": 2, "text": "b"}]


def test_partitions_of_lines(tmp_path: Path) -> None:
    """The same for JSON lines; pandas' own layout needs no mark of success."""
    lay_out(tmp_path / "in", {"d=1/x.json": b'{"text": "a"}\n', "d=2/y.json": b'{"text": ""}\n{"text": "b"}'})
    table, told = rows_of(tmp_path / "in")
    assert table.select(["text", "d"]).to_pylist() == [{"text": "a", "d": 1}, {"text": "b", "d": 2}]
    assert told == {1: "the text is empty"}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"a.txt": b""},
            "in: holds no file whose name ends in one of .parquet, .arrow, .feather, .csv, .jsonl, .ndjson,"
            + " .json",
        ),
        (
            {"a.csv": b"text\na", "b.jsonl": b'{"text": "b"}'},
            "in: a.csv is CSV and b.jsonl is JSON lines; a job reads one format",
        ),
        (
            {"_delta_log/0.json": b"{}", "part-0.parquet": one("a")},
            "in: is a Delta table, whose log says which files count; export it as Parquet",
        ),
        (
            {"t/_delta_log/0.json": b"{}", "t/part-0.parquet": one("a")},
            "in/t: is a Delta table, whose log says which files count; export it as Parquet",
        ),
        (
            {".hoodie/hoodie.properties": b"", "0.parquet": one("a")},
            "in: is a Hudi table, whose log says which files count; export it as Parquet",
        ),
        (
            {"_spark_metadata/0": b"", "0.parquet": one("a")},
            "in: is an output of Spark's streaming, whose log says which files count; export it as Parquet",
        ),
        (
            {"a.jsonl": b'{"text": "a"}', "b.jsonl.xz": b""},
            "in/b.jsonl.xz: JSON lines isn't read from .xz",
        ),
        ({"a.parquet": one("a"), "b.parquet.gz": b""}, "in/b.parquet.gz: Parquet isn't read from .gz"),
        (
            {"0.parquet": one("a"), "1.parquet": pa.table({"title": ["b"]})},
            "in/1.parquet: no column `text`; there are `title`",
        ),
        (
            {
                "0.parquet": pa.table({"text": ["a"], "n": [1]}),
                "1.parquet": pa.table({"text": ["a"], "n": ["1"]}),
            },
            "in/1.parquet: column `n` holds string, and int64 in a file before, which no column can; name the"
            " columns to keep without it",
        ),
        (
            {"text=a/0.parquet": pa.table({"n": [1]})},
            "in/text=a/0.parquet: column `text` is a folder's name, not text",
        ),
    ],
)
def test_folders_that_cant_be_one_input(tmp_path: Path, files: dict[str, Any], why: str) -> None:
    """By file and column."""
    assert refusal(lay_out(tmp_path / "in", files)) == why


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Also one that leads back; one that leads nowhere is told."""
    lay_out(tmp_path / "elsewhere", {"b.parquet": one("b")})
    lay_out(tmp_path / "in", {"a.parquet": one("a")})
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    table, _ = rows_of(tmp_path / "in")
    assert table["text"].to_pylist() == ["a", "b"]
    (tmp_path / "in" / "c.parquet").symlink_to(tmp_path / "nowhere")
    assert refusal(tmp_path / "in") == "in/c.parquet: isn't a file, or a link that leads nowhere"


def test_a_part_of_a_table_with_a_log_is_none(tmp_path: Path) -> None:
    """Its log stands above it."""
    lay_out(tmp_path / "in", {"_delta_log/0.json": b"{}", "d=1/0.parquet": one("a")})
    part = tmp_path / "in" / "d=1"
    assert refusal(part, output="../out.parquet") == (
        "d=1: is a Delta table, whose log says which files count; export it as Parquet"
    )


def test_folders_whose_names_arent_utf8_make_no_columns(tmp_path: Path) -> None:
    """In one line."""
    lay_out(tmp_path / "in", {os.fsdecode(b"d=caf\xe9/a.jsonl"): b"{}"})
    assert refusal(tmp_path / "in").startswith("in: its folders' names make no columns: 'utf-8' codec can't")


def test_an_output_stands_beside_its_input(tmp_path: Path) -> None:
    """Its parts would be taken for rows as the job is gone on with."""
    lay_out(tmp_path / "in", {"a.parquet": one("a")})
    assert refusal(tmp_path / "in", output="in/o.parquet") == (
        f"in/o.parquet: would stand among the files of the input, {tmp_path}/in".replace(f"{tmp_path}/", "")
    )


# --- a trial -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("limit", [1, 5, 8, 99])
def test_a_limit_takes_the_first_rows(tmp_path: Path, suffix: str, limit: int) -> None:
    """And no more of the file than these; an output of part of it isn't resumed as one of the whole."""
    texts = [f"text {n}" for n in range(12)]
    file = tmp_path / f"in{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif suffix == ".csv":
        file.write_text("\n".join(["text", *texts]))
    else:
        write(pa.table({"text": texts}), file)
    table, _ = rows_of(file, limit=limit)
    assert table["text"].to_pylist() == texts[:limit]


def test_a_limit_opens_no_file_behind_it(tmp_path: Path) -> None:
    """Whatever is wrong with that."""
    lay_out(tmp_path / "in", {"a.jsonl": b'{"text": "a"}\n', "b.jsonl.gz": b"junk"})
    table, _ = rows_of(tmp_path / "in", limit=1)
    assert table["text"].to_pylist() == ["a"]


def test_a_compressed_file_is_told_by_its_name_in_either_case(tmp_path: Path) -> None:
    """As Windows has them."""
    for name in ("in.jsonl.GZ", "in.JSONL.gz"):
        assert_read(tmp_path / name, gzip.compress(b'{"text": "a"}\n'), ["a"], {})


def no_cluster(_: str | None) -> None:
    """Join as where there is none."""
    raise ConnectionError


def test_a_dry_run_says_what_would_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, and leaves nothing behind; without a cluster, what needs none."""
    monkeypatch.setattr(connections, "join", no_cluster)
    monkeypatch.setattr(embed, "in_background", lambda: None)  # the other tests go on in this process
    file, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    file.write_text('{"text": "a"}\n{"text": ""}\n\n{"text": \n{"text": 3}\n')
    command = ["embed", str(file), str(output), "--model", "m", "--dry-run"]
    assert main(command) == 0
    told = capsys.readouterr()
    shared = {"code": "invalid_request", "file": "in.jsonl", "column": "text"}
    reasons = {1: "the text is empty", 2: "the line isn't JSON", 3: "not a text: int"}
    assert [json.loads(line) for line in told.out.splitlines()] == [
        {"row": row, "row_in_file": row, "reason": reason, **shared} for row, reason in reasons.items()
    ]
    assert "no Ray cluster answers: texts that are too long aren't found\n" in told.err
    assert told.err.endswith(f"{file}: 3 of 4 rows would be refused\n")
    assert list(tmp_path.iterdir()) == [file]
    assert pa.cpu_count() == cores_here()
    output.write_text("precious")
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(f"{output} is there already; --overwrite replaces it\n")
