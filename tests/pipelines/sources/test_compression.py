import bz2
import gzip
import io
import lzma
import random
import zlib

import pytest
import zstandard

from pipelines.sources.compression import FEED, WINDOW, Decompressed

PACK = {"gzip": gzip.compress, "zstd": zstandard.compress, "bzip2": bz2.compress, "xz": lzma.compress}
codecs = pytest.mark.parametrize("codec", PACK)
TEXT = random.Random(0).randbytes(FEED * 5) + b"a" * 1_000_000


def read(content, codec, size=-1):
    with io.BufferedReader(Decompressed(io.BytesIO(content), codec)) as stream:
        return stream.read(size)


@codecs
@pytest.mark.parametrize("padding", [0, 1, FEED, 10 * FEED])
def test_parts_one_after_another_with_zeros_behind_are_one_stream(codec, padding):
    zeros = bytes(padding)
    assert read(PACK[codec](TEXT) + zeros, codec) == TEXT
    assert read(PACK[codec](TEXT) + zeros + PACK[codec](b"more") + zeros, codec) == TEXT + b"more"
    assert read(b"", codec) == b""


@codecs
@pytest.mark.parametrize("ending", [b"garbage", b"\0\0garbage"])
def test_what_is_cut_or_has_something_else_behind_is_an_error(codec, ending):
    content = PACK[codec](TEXT)
    for wrong in (content[:-1], content[:20], content[:1], content + content[:-1], content + ending, b"\0" * 99, b"no"):
        with pytest.raises(OSError, match=r"."):
            read(wrong, codec)


@codecs
def test_little_is_decompressed_at_once_however_much_a_few_bytes_stand_for(codec):
    content = PACK[codec](bytes(10_000_000 if codec == "bzip2" else 50_000_000))
    stream = Decompressed(io.BytesIO(content), codec)
    stream.read(1)
    assert len(stream._ready) < 20_000_000


def raw_frame(content, window_log):
    """A Zstandard frame of one raw block, behind a header that asks for a window of so many bits."""
    header = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, (window_log - 10) << 3])
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


def test_long_windows_are_read_up_to_a_limit():
    assert read(raw_frame(b"text", 31), "zstd") == b"text"
    assert WINDOW == 1 << 31
    with pytest.raises(OSError, match="its window is longer than 2 GiB: compress it again with a shorter one"):
        read(raw_frame(b"text", 32), "zstd")
    asking = bytearray(lzma.compress(b"text"))
    asking[asking.index(b"\x21\x01") + 2] = 40  # of LZMA2: a dictionary of 4 GiB
    asking[20:24] = zlib.crc32(asking[12:20]).to_bytes(4, "little")  # of the block's header
    with pytest.raises(OSError, match="its window is longer than 2 GiB"):
        read(bytes(asking), "xz")


def test_what_zstandard_is_told_to_skip_is_skipped():
    assert read(b"\x50\x2a\x4d\x18\x03\0\0\0xyz" + zstandard.compress(b"text"), "zstd") == b"text"
