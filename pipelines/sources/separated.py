"""Rows of .csv and .tsv files, with names of columns in the first: quotes stand around what holds separators, line ends
or quotes, which are doubled. In UTF-8; what is not is escaped as surrogates, to be found in its row."""

import csv
import io
from collections.abc import Iterator

from pipelines.sources.formats import SEPARATED, suffix_and_codec
from pipelines.sources.storage import open_decompressed, printable, readable
from pipelines.workflow.errors import UserError

FIELD = 1 << 30  # characters of a field, at most: a quote that is never closed takes the rest of the file


def read_separated(path: str) -> Iterator[list[str]]:
    """The fields of each row, the columns' names first; empty lines are none. Raises UserError for a damaged file."""
    csv.field_size_limit(FIELD)
    with readable(path), open_decompressed(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(text, delimiter=SEPARATED[suffix_and_codec(path)[0]], strict=True)
        try:
            yield from filter(None, rows)
        except csv.Error as error:
            raise UserError(
                f"{printable(path)}, line {rows.line_num}: {error}: mend its quotes, or give JSON lines or Parquet"
            ) from None
