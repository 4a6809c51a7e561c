"""Byte streams, .gz, .zst, .xz and .bz2 unpacked on the way; a cut-off archive is an error."""

import bz2
import gzip
import lzma
import zlib
from io import BufferedIOBase, BufferedReader, RawIOBase

import zstandard

ARCHIVE_ERRORS = (OSError, EOFError, zstandard.ZstdError, zlib.error, lzma.LZMAError)
"""What reading a broken archive raises."""


def unpacked(file: BufferedIOBase, packing: str) -> BufferedIOBase:
    """Return the stream inside an open file, by its packing's ending; "": the file itself."""
    if packing == ".gz":
        return gzip.GzipFile(fileobj=file)  # pyright: ignore
    if packing == ".xz":
        return lzma.LZMAFile(file)  # pyright: ignore
    if packing == ".bz2":
        return bz2.BZ2File(file)  # pyright: ignore
    if packing == ".zst":
        return BufferedReader(ZstandardFrames(file), 2**20)
    return file


class ZstandardFrames(RawIOBase):
    """The frames of a .zst file, one after the other.

    zstandard's own reader takes a cut-off file's end for the end of the data. Unpacks 256 bytes
    at a time, which a hostile file can blow up to 8 MiB and no further.
    """

    def __init__(self, file: BufferedIOBase) -> None:
        self.file = file
        self.frame: zstandard.ZstdDecompressionObj | None = None
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore
        """Fill what fits of the buffer; EOFError where a frame is cut off."""
        while not self.unpacked:
            packed = (self.frame.unused_data if self.frame else b"") or self.file.read(2**8)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the last zstandard frame is cut off")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
            self.unpacked = memoryview(self.frame.decompress(packed))
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size
