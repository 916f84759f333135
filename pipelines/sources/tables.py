"""Tables of documents: .parquet and .arrow files (IPC, as a file or a stream), read row by row.

Only the columns of text and id are read, in small batches. Parts (row groups, record batches) can be read alone, but
not of a compressed file, which is decompressed to a temporary one, nor of a remote .arrow file. A local .arrow file is
mapped into memory: passing over its batches costs nothing, unless they are compressed inside.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.formats import is_url, suffix_and_codec
from pipelines.sources.storage import (
    BLOCK,
    POINTER,
    open_binary,
    open_decompressed,
    printable,
    readable,
    refuse_pointer,
)
from pipelines.workflow.errors import UserError

HELD = 16  # rows of a row group, at once
Batches = Iterator[tuple[int, pa.RecordBatch]]  # the number of the first row, rows


def part_sizes(path: str, size: int) -> list[int]:
    """About how many bytes each part holds that can be read alone. Raises UserError for a damaged file."""
    if not _splits(path):
        return [size]
    with readable(path), _open(path) as file:
        if suffix_and_codec(path)[0] == ".parquet":
            metadata = pq.ParquetFile(file).metadata
            return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        if _is_ipc_file(file):
            count = pa.ipc.open_file(_mapped(file)).num_record_batches
            return [size // count] * count if count else []
        messages = pa.ipc.MessageReader.open_stream(_mapped(file))
        return [message.body.size for message in messages if message.type == "record batch"]


def read_rows(
    path: str, parts: tuple[int, int], text_field: str, id_field: str
) -> Iterator[tuple[int, pa.Scalar, pa.Scalar | None]]:
    """(number from 0, text, id where there is such a column) of each row of the parts.

    Raises UserError for a damaged file and for one without a column of text.
    """
    with readable(path), _open(path) as file:
        read = _parquet_batches if suffix_and_codec(path)[0] == ".parquet" else _arrow_batches
        for first, batch in read(path, file, slice(*parts) if _splits(path) else slice(0, None), text_field, id_field):
            texts = batch.column(text_field)
            ids = batch.column(id_field) if id_field in batch.schema.names else None
            for row in range(len(batch)):
                yield first + row, texts[row], None if ids is None else ids[row]


def column_names(path: str) -> list[str]:
    """The names of a table's columns. Raises UserError for a damaged one."""
    with readable(path), _open(path) as file:
        if suffix_and_codec(path)[0] == ".parquet":
            return list(pq.ParquetFile(file).schema_arrow.names)
        return list((pa.ipc.open_file if _is_ipc_file(file) else pa.ipc.open_stream)(file).schema.names)


def name_some(names: Sequence[str]) -> str:
    """The first few of the names, shortened, for an error's text."""
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}...") for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"


def _splits(path: str) -> bool:
    suffix, codec = suffix_and_codec(path)
    return codec is None and (suffix == ".parquet" or not is_url(path))


def _open(path: str) -> IO[bytes]:
    """The table's bytes, seekable. Raises UserError for a git-lfs pointer."""
    file: IO[bytes]
    if suffix_and_codec(path)[1] is None:
        file = open_binary(path)
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        with open_decompressed(path) as stream:
            shutil.copyfileobj(stream, file, BLOCK)
        file.seek(0)
    refuse_pointer(path, file.read(len(POINTER)))
    file.seek(0)
    return file


def _parquet_batches(path: str, file: IO[bytes], parts: slice, text_field: str, id_field: str) -> Batches:
    table = pq.ParquetFile(file, buffer_size=BLOCK)
    columns = _columns(path, table.schema_arrow, text_field, id_field)
    groups = range(table.num_row_groups)
    row = sum(table.metadata.row_group(number).num_rows for number in groups[: parts.start])
    for batch in table.iter_batches(HELD, list(groups[parts]), columns, use_threads=False):
        yield row, batch
        row += len(batch)


def _arrow_batches(path: str, file: IO[bytes], parts: slice, text_field: str, id_field: str) -> Batches:
    is_file = _is_ipc_file(file)
    source = file if is_url(path) and suffix_and_codec(path)[1] is None else _mapped(file)

    def reader(**options: Any) -> Any:
        return pa.ipc.open_file(source, **options) if is_file else pa.ipc.open_stream(source, **options)

    schema = reader().schema
    columns = _columns(path, schema, text_field, id_field)
    source.seek(0)
    batches = reader(options=pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in columns]))
    if is_file:
        batches = map(batches.get_batch, range(batches.num_record_batches))
    row = 0
    for number, batch in enumerate(batches):
        if parts.stop is not None and number >= parts.stop:
            return
        if number >= parts.start:
            for column in batch.columns:
                _check_offsets(column)
            yield row, batch
        row += len(batch)


def _is_ipc_file(file: IO[bytes]) -> bool:
    """Whether an .arrow file is of the file format; else it is of the stream format."""
    magic = file.read(6)
    file.seek(0)
    return magic == b"ARROW1"


def _mapped(file: IO[bytes]) -> pa.NativeFile:
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("it is empty")
    return pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _check_offsets(column: pa.Array) -> None:
    """Raise ArrowInvalid where a damaged column leads out of its memory. Whether it is UTF-8 is seen row by row."""
    same = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column.view(same.get(column.type, column.type)).validate(full=True)


def _columns(path: str, schema: pa.Schema, text_field: str, id_field: str) -> list[str]:
    """The columns to read."""
    columns = choose_columns(path, schema.names, text_field, id_field)
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise UserError(
            f"{printable(path)} holds {kind} in column {text_field!r}, not text; its columns are "
            f"{name_some(schema.names)}: set its source's text_field"
        )
    return columns


def choose_columns(path: str, names: Sequence[str], text_field: str, id_field: str) -> list[str]:
    """The columns of text and, where there is one, of ids. Raises UserError where there is none of text, or two of a
    name."""
    for name, setting in ((text_field, "text_field"), (id_field, "id_field")):
        if names.count(name) > 1:
            raise UserError(
                f"{printable(path)} has {names.count(name)} columns {name!r}: give them different names, or set its "
                f"source's {setting} to another"
            )
    if text_field not in names:
        raise UserError(
            f"{printable(path)} has no column {text_field!r}, its columns are {name_some(names)}: set its source's "
            f"text_field"
        )
    return [text_field, id_field] if id_field in names and id_field != text_field else [text_field]
