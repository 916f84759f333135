"""What a file is, by its name: its format, its compression, and what usually lies beside records."""

import os
import posixpath
import re

from pipelines.workflow.plugins import Plugin, find_plugins

LINES = (".jsonl", ".json")  # a JSON object a line
TABLES = (".parquet", ".arrow")
SEPARATED = {".csv": ",", ".tsv": "\t"}
ROWS = (*TABLES, *SEPARATED)
RECORDS = (*LINES, *ROWS)
CERTAIN = (".jsonl", *TABLES)  # made for records alone; the others may be anything
PROSE = (".txt", ".md", ".tex")  # files that can only be meant as text
ALIASES = {
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".pq": ".parquet",
    ".parq": ".parquet",
    ".feather": ".arrow",
    ".arrows": ".arrow",
    ".ipc": ".arrow",
}
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
READERS = "fot.readers"  # entry points; each is named as the ending of the files that it reads
OURS = frozenset(ending.removeprefix(".") for ending in (*RECORDS, *PROSE, *ALIASES, *CODECS))
IN_TREES = (".gz", ".zst")  # endings of what is decompressed in a tree: a repository keeps others for its programs

ABOUT = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "CITATION", "AUTHORS", "CHANGELOG")
CHECKSUMS = (".crc", ".md5", ".sha1", ".sha256", ".sha512", ".sig", ".asc")
SUMS = ("MD5SUM", "SHA1SUM", "SHA256SUM", "SHA512SUM", "CHECKSUM")
LOGS = ("_delta_log", "_temporary")  # directories of what wrote the tables
UNREAD = {
    "archives": (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".jar", ".warc", ".wet"),
    "files compressed in a way that is not read": (
        *(".lz4", ".lzo", ".lzma", ".sz", ".snappy", ".br", ".z", ".lz", ".deflate", ".bgz"),
    ),
    "data of other formats": (
        *(".orc", ".avro", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".tfrecord", ".msgpack", ".xlsx", ".xls"),
        *(".ods", ".db", ".sqlite", ".sqlite3", ".duckdb", ".rds", ".rdata", ".dta", ".sav", ".lance", ".mdb"),
    ),
    "documents of other formats": (*(".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".djvu", ".ppt", ".pptx"),),
}
MEDIA = (
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ico", ".mp3", ".wav", ".flac", ".ogg"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".ttf", ".otf", ".woff", ".woff2"),
)


def is_url(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def suffix_and_codec(name: str) -> tuple[str, str | None]:
    """The ending that tells the format, and the compression: a.jsonl.gz and A.NDJSON.GZ give .jsonl, gzip."""
    stem, last = os.path.splitext(name)
    codec = CODECS.get(last.lower())
    suffix = (last if codec is None else os.path.splitext(stem)[1]).lower()
    return ALIASES.get(suffix, suffix), codec


def plugin_of(name: str) -> Plugin | None:
    """The plugin that reads a file, if one does. Raises UserError as `find_plugins` does."""
    return find_plugins(READERS, OURS).get(suffix_and_codec(name)[0].removeprefix("."))


def holds_records(name: str) -> bool:
    """Whether a file of its own is read line by line, row by row, or by a plugin."""
    return suffix_and_codec(name)[0] in RECORDS or plugin_of(name) is not None


def is_certain(name: str) -> bool:
    """Whether the ending is made for records alone."""
    return suffix_and_codec(name)[0] in CERTAIN or plugin_of(name) is not None


def companion(name: str, size: int) -> str | None:
    """What a file is that lies beside records without being one, and is no reason to take its directory for a document:
    `name` within that directory. None for any other."""
    *directories, base = name.split("/")
    suffix = suffix_and_codec(base)[0]
    if any(directory in LOGS for directory in directories) or (base.startswith("_") and "." not in base):
        return "marks and logs of what wrote records"  # _SUCCESS, _metadata, _committed_123
    if holds_records(name):
        return None if size or is_certain(name) else "empty files"
    if suffix in CHECKSUMS or base.upper().startswith(SUMS):
        return "checksums"
    if suffix in MEDIA:
        return "pictures, sound and fonts"
    return "texts about records" if base.partition(".")[0].upper() in ABOUT else None if size else "empty files"


def unread(name: str) -> str | None:
    """What kind of data a file holds that nothing here reads, by its name. None for any other."""
    suffix, codec = suffix_and_codec(name)
    if plugin_of(name) is not None:
        return None
    for kind, suffixes in UNREAD.items():
        if suffix in suffixes:
            return kind
    inner = suffix_and_codec(posixpath.splitext(name)[0])[0]
    known = codec is not None or suffix in ("", *RECORDS, *PROSE)
    return "records under an ending that is not known" if inner in (*CERTAIN, *SEPARATED) and not known else None
