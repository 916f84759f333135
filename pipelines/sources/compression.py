"""Decompression of files as other tools write them: gzip, Zstandard, bzip2, xz; several parts after one another, and
zeros behind them.

What is decompressed at once is bounded, however much a few bytes stand for; what a file asks for by itself, the window
in which it repeats itself, by WINDOW.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import zstandard

WINDOW = 1 << 31  # bytes: the longest that `zstd --long=31` and `xz` ask for
FEED = 512  # compressed bytes taken at a time: of Zstandard they stand for at most 16 MiB


class _Decompressor(Protocol):
    """Of one part of a file; as in the standard library's bz2 and lzma."""

    @property
    def eof(self) -> bool:
        """Whether the part has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether nothing more comes without more data."""

    @property
    def unused_data(self) -> bytes:
        """What lies behind the part's end."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """What the data, and what is left of earlier data, comes to, `max_length` bytes at most."""


class _AllAtOnce:
    """A decompressor of zlib's or zstandard's, which gives all that it has."""

    needs_input = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return bytes(self._inner.decompress(data))


_BEGIN: dict[str, Callable[[], _Decompressor]] = {
    "gzip": lambda: _AllAtOnce(zlib.decompressobj(wbits=31)),
    "zstd": lambda: _AllAtOnce(zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, WINDOW),
}


class Decompressed(io.RawIOBase):
    """A stream of what a compressed stream holds. Reading what is damaged, cut or asks for too long a window is an
    OSError."""

    def __init__(self, stream: IO[bytes], codec: str) -> None:
        self._stream, self._codec = stream, codec
        self._part = _BEGIN[codec]()
        self._fed = False  # anything of this part
        self._first = True  # part of the file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            try:
                if not self._more(len(buffer)):
                    return 0
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
                raise OSError(self._reason(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    def _more(self, room: int) -> bool:
        """Decompress a little more. False at the end."""
        data = b""
        if self._part.eof:
            data = self._part.unused_data
            self._part, self._fed, self._first = _BEGIN[self._codec](), False, False
        if not data and self._part.needs_input:
            data = self._stream.read(FEED)
            if not data:
                if self._fed:
                    raise EOFError("it ends in the middle")
                return False
        if not self._fed and not self._first:
            data = data.lstrip(b"\0")  # padding: no part begins with zeros
        if data or self._fed:
            self._fed = True
            self._ready = memoryview(self._part.decompress(data, room))
        return True

    def _reason(self, error: Exception) -> str:
        text = str(error)
        if "requires too much memory" in text or "Memory usage limit" in text:
            return f"its window is longer than {WINDOW >> 30} GiB: compress it again with a shorter one"
        return f"{self._codec}: {text}"
