"""Reads documents from tables, Parquet and Arrow; the only file that knows pyarrow.  And all readers, by form."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.atomic_files import Recoverable
from data_pipeline.build.documents import (
    CHUNK,
    DOCUMENT_BYTES,
    BadDocuments,
    Documents,
    read_csv,
    read_lines,
    read_mediawiki,
)

ROWS = 1024  # of a table, at most, read at a time
BATCH_BYTES = 16 << 20  # of their documents, about


def read_parquet(
    file: BinaryIO, name: str, field: str, bad: BadDocuments, span: tuple[int, int] | None = None
) -> Documents:
    """Yields the column `field` of each row of a Parquet table; reads no other column.

    Args:
      span: only the row groups that begin in these bytes of the file.
    """
    pyarrow = _pyarrow(name)
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        table = parquet.ParquetFile(file, buffer_size=CHUNK, page_checksum_verification=True)
        _require_column(table.schema_arrow, field, name)
        groups = (
            list(range(table.num_row_groups)) if span is None else _groups_in(table.metadata, span, file.seek(0, 2))
        )
        for rows, alike in itertools.groupby(groups, lambda group: _rows_at_a_time(table.metadata, group, field)):
            for batch in table.iter_batches(rows, list(alike), columns=[field], use_threads=False):
                yield batch.column(0)

    yield from _rows(pyarrow, batches, name, bad)


def _groups_in(metadata: Any, span: tuple[int, int], size: int) -> list[int]:
    """Returns the row groups that begin in a span of a file, whose spans have each group once, in order."""
    found, place = [], 0
    for number in range(metadata.num_row_groups):
        column = metadata.row_group(number).column(0)
        begins = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        place = min(max(place, begins), size - 1)
        if span[0] <= place < span[1]:
            found.append(number)
    return found


def _rows_at_a_time(metadata: Any, number: int, field: str) -> int:
    """Returns how many rows of a group are decoded at a time, a power of two: so most groups have the same number."""
    group = metadata.row_group(number)
    columns = (group.column(place) for place in range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return 1 << _fitting(group.num_rows, size).bit_length() - 1


def _fitting(rows: int, size: int) -> int:
    """Returns how many of `rows`, which have `size` bytes together, are read at a time."""
    return min(max(BATCH_BYTES * rows // max(size, 1), 1), ROWS)


def read_arrow(file: BinaryIO, name: str, field: str, bad: BadDocuments) -> Documents:
    """Yields the column `field` of each row of an Arrow file or stream, which Hugging Face's datasets are on disk."""
    pyarrow = _pyarrow(name)

    def batches() -> Iterator[Any]:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
        place = _require_column(reader.schema, field, name)
        for number in range(reader.num_record_batches) if is_file else iter(int, 1):
            try:
                batch = reader.get_batch(number) if is_file else reader.read_next_batch()
            except StopIteration:
                return
            column = _as_bytes(pyarrow, batch.column(place))  # UTF-8 is looked for in each document
            column.validate(full=True)  # otherwise wrong offsets in a damaged file would be followed
            yield column

    yield from _rows(pyarrow, batches, name, bad)


def _as_bytes(pyarrow: Any, column: Any) -> Any:
    """Returns a column of strings as one of bytes, without looking at them."""
    if isinstance(column, pyarrow.DictionaryArray):
        return pyarrow.DictionaryArray.from_arrays(column.indices, _as_bytes(pyarrow, column.dictionary), safe=False)
    strings = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}
    kind = strings.get(str(column.type))
    return column.view(getattr(pyarrow, kind)()) if kind else column


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise Recoverable(f"{name} needs pyarrow: pip install 'charlstm[inputs]'") from None
    return pyarrow


def _require_column(schema: Any, field: str, name: str) -> int:
    """Returns the number of the column `field`.  Raises ValueError if it is absent or has no strings."""
    import pyarrow.types as types

    places = schema.get_all_field_indices(field)
    if len(places) != 1:
        names = ", ".join(map(repr, schema.names[:8])) or "none"
        kind = "two columns" if places else "no column"
        raise ValueError(f"{name} has {kind} {field!r}; its columns are {names}: name one with --text_field")
    found = schema.field(places[0]).type
    kind = found.value_type if types.is_dictionary(found) else found
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(is_text(kind) for is_text in (*texts, types.is_binary, types.is_large_binary, types.is_binary_view)):
        raise ValueError(f"{name}: column {field!r} has {found}, no strings: name another with --text_field")
    return places[0]


def _rows(pyarrow: Any, batches: Callable[[], Iterator[Any]], name: str, bad: BadDocuments) -> Documents:
    def pieces() -> Iterator[list[bytes | None]]:
        for column in batches():
            stored = column.dictionary if isinstance(column, pyarrow.DictionaryArray) else column
            rows = _fitting(len(stored), stored.nbytes)
            for start in range(0, len(column), rows):
                piece = column.slice(start, rows)
                piece = piece.dictionary_decode() if stored is not column else piece
                yield piece.cast(pyarrow.large_binary()).to_pylist()

    number = 0
    found = pieces()
    while True:
        try:
            values = next(found, None)
            if values is None:
                return
        except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # of the disk or the store
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{name} is damaged or no such table ({reason}): copy it again") from None
        for value in values:
            number += 1
            if value is None:
                bad.add(number, "no value (null)")
            elif len(value) > DOCUMENT_BYTES:
                bad.add(number, f"a document of more than {DOCUMENT_BYTES:,} bytes", value[:400])
            else:
                yield number, value


class Reader(NamedTuple):
    """A reader of one form of file."""

    read: Callable[..., Documents]  # (file: BinaryIO, its name for messages, field, bad[, span])
    unit: str  # that documents are counted in
    seeks: bool = False  # whether it needs more than a stream
    knows_span: bool = False  # whether it takes the span of a file that is cut


READERS = {
    "jsonl": Reader(read_lines, "line", knows_span=True),
    "csv": Reader(read_csv, "line"),
    "parquet": Reader(read_parquet, "row", seeks=True, knows_span=True),
    "arrow": Reader(read_arrow, "row", seeks=True),
    "xml": Reader(read_mediawiki, "page"),
}
