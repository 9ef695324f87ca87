"""The types of columns: which one holds what several files have, and which values it can't hold.

What is wrong with a value is that row's error: a column never fails for one of its values.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from deployments.errors import InvalidRequestError, first_line

# What pyarrow raises for a value that a type can't hold.
UNFIT = (pa.ArrowException, OverflowError, TypeError, ValueError)
# Holds integers of both signs up to 64 bits, and all unsigned ones.
ANY_INTEGER = pa.decimal128(20, 0)
WIDEST_INTEGER = pa.decimal128(38, 0)
Faults = dict[int, InvalidRequestError]


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that holds the same values without sharing any, which formats and files do otherwise.

    A file's dictionary is its own, and Parquet knows no runs; views are a way to lie in memory.
    """
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        kind = plain(kind.value_type)
    elif types.is_string_view(kind):
        kind = pa.string()
    elif types.is_binary_view(kind):
        kind = pa.binary()
    elif types.is_struct(kind):
        kind = pa.struct([(each.name, plain(each.type)) for each in kind])
    elif types.is_map(kind):
        kind = pa.map_(plain(kind.key_type), plain(kind.item_type))
    elif types.is_fixed_size_list(kind):
        kind = pa.list_(plain(kind.value_type), kind.list_size or -1)  # Parquet has none of size 0
    elif types.is_large_list(kind):
        kind = pa.large_list(plain(kind.value_type))
    elif types.is_list(kind):
        kind = pa.list_(plain(kind.value_type))
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of that type may hold texts; one without any value may."""
    kind = plain(kind)
    return kind in (pa.string(), pa.large_string(), pa.null())


def united(kinds: Iterable[pa.DataType]) -> pa.DataType:
    """Return the type that holds the values of all. Raises ArrowTypeError where there is none."""
    found = pa.null()
    for each in kinds:
        kind = plain(each)
        if pa.uint64() in (found, kind) and any(map(pa.types.is_signed_integer, (found, kind))):
            found = kind = ANY_INTEGER  # Arrow itself would take int64, which can't hold the largest
        found, kind = _with_room(found, kind), _with_room(kind, found)
        both = [pa.schema([("", found)]), pa.schema([("", kind)])]
        found = pa.unify_schemas(both, promote_options="permissive").field(0).type
    return found


def _with_room(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a decimal with the digits that integers of the other type may have, any other type as it is."""
    if not (pa.types.is_decimal(kind) and pa.types.is_integer(other)):
        return kind
    digits = max(kind.precision - kind.scale, ANY_INTEGER.precision) + kind.scale
    wide = pa.decimal128 if digits <= WIDEST_INTEGER.precision else pa.decimal256
    return wide(digits, kind.scale)


def inferred(values: Sequence[Any]) -> pa.Array:
    """Return Python's values as a column of the type that suits them. Raises one of `UNFIT`."""
    try:
        return pa.array(values)
    except OverflowError:
        for kind in (pa.uint64(), WIDEST_INTEGER):
            with contextlib.suppress(*UNFIT):
                return pa.array(values, kind)
        raise
    except UNFIT:
        return pa.array(values, from_pandas=True)  # a NaN among them, which pandas writes for what is missing


def built(values: Sequence[Any], field: pa.Field) -> tuple[pa.Array, Faults]:
    """Return Python's values as a column, null where they can't be held, and why."""
    try:
        return pa.array(values, field.type), {}
    except UNFIT:
        pass
    faults: Faults = {}
    kept = []
    for row, value in enumerate(values):
        try:
            kept.append(pa.array([value], field.type, from_pandas=True))
        except UNFIT as error:
            faults[row] = _fault(field, error)
            kept.append(pa.nulls(1, field.type))
    return pa.concat_arrays(kept), faults


def cast(column: pa.ChunkedArray, field: pa.Field) -> tuple[pa.ChunkedArray, Faults]:
    """Return a column in another type, null where its values can't be held or aren't valid, and why."""
    column = pa.chunked_array([_decoded(chunk) for chunk in column.chunks], plain_top(column.type))
    try:
        return _checked(column, field), {}
    except UNFIT:
        pass
    faults: Faults = {}
    kept = []
    for row in range(len(column)):
        try:
            kept.append(_checked(_row(column, row), field))
        except UNFIT as error:
            faults[row] = _fault(field, error)
            kept.append(pa.chunked_array([pa.nulls(1, field.type)]))
    whole = pa.chunked_array([chunk for each in kept for chunk in each.chunks], field.type)
    return pa.chunked_array(whole.combine_chunks(), field.type), faults


def _row(column: pa.ChunkedArray, row: int) -> pa.ChunkedArray:
    """Return a row alone: a slice of lists may share what is wrong with others, and not all can be taken."""
    try:
        return column.take([row])
    except pa.ArrowNotImplementedError:
        return column.slice(row, 1)


def texts_of(column: pa.ChunkedArray) -> list[Any]:
    """Return a column of texts as Python's; an error in place of what isn't UTF-8."""
    column = pa.chunked_array([_decoded(chunk) for chunk in column.chunks], plain_top(column.type))
    if pa.types.is_null(column.type):
        return [None] * len(column)
    return [_text(each) for each in column.cast(pa.large_binary()).to_pylist()]


def plain_top(kind: pa.DataType) -> pa.DataType:
    """Return the type of what a dictionary or runs hold, any other as it is."""
    is_shared = pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind)
    return plain(kind) if is_shared else kind


def _decoded(chunk: pa.Array) -> pa.Array:
    """Return a column's values without a dictionary or runs, unchecked."""
    wanted = plain_top(chunk.type)
    if pa.types.is_dictionary(chunk.type):
        values = _decoded(chunk.dictionary).cast(wanted)  # Arrow takes nothing from among views
        return pa.DictionaryArray.from_arrays(chunk.indices, values).dictionary_decode()
    if pa.types.is_run_end_encoded(chunk.type):
        return _decoded(pa.compute.run_end_decode(chunk)).cast(wanted)
    return chunk


def _checked(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        column = column.cast(field.type)
    except pa.ArrowNotImplementedError:  # as for dictionaries of views, and runs, in lists
        column = pa.chunked_array([pa.array(column.to_pylist(), field.type)])
    column.validate(full=True)  # what a file says of itself may be wrong: UTF-8 above all
    return column


def _text(content: bytes | None) -> Any:
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return InvalidRequestError("the text isn't UTF-8")


def check_castable(kind: pa.DataType, wanted: pa.DataType) -> None:
    """Raise one of `UNFIT` where no value of a type can be held by another one."""
    _checked(pa.chunked_array([pa.nulls(1, plain_top(kind))]), pa.field("", wanted))


def reason(error: BaseException) -> str:
    """Return why a value doesn't fit, in one line."""
    if isinstance(error, OverflowError) or "PyLong" in str(error):
        return "the number is too large"  # their texts name the types of C
    return first_line(error)


def _fault(field: pa.Field, error: BaseException) -> InvalidRequestError:
    if "UTF8" in str(error) or isinstance(error, UnicodeError):
        return InvalidRequestError(f"column `{field.name}` isn't UTF-8", field.name)
    return InvalidRequestError(f"column `{field.name}`, of {field.type}: {reason(error)}", field.name)
