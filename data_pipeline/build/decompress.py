"""Decompresses files in streams: all members of a file, and nothing beside them."""

import bz2
import io
import lzma
import zlib
from typing import Any, BinaryIO

from data_pipeline.atomic_files import Recoverable

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
PADDED = (".gz", ".xz")  # those whose members may be followed by NUL, up to the end of a block
INPUT = 64 << 10  # bytes given to a decoder at a time
MEMORY = 512 << 20  # bytes that a decoder of xz may take
# Bytes of text for each compressed one: natural text has up to 20, logs up to 200, a decompression bomb thousands.
BOMB, BOMB_FROM = 500, 64 << 20


class Decompressed(io.RawIOBase):
    """The content of a compressed file, as a file that is read from its beginning to its end.

    Raises ValueError, in one sentence with `name` and the byte of the compressed file, if the file is damaged, ends
    early, has something else after its end, or expands as no text does.

    Attributes:
      passed: the byte of the file at which the first member at or after `mark` begins, or the file ends; None before.
    """

    def __init__(self, file: BinaryIO, compression: str, name: str, start: int = 0, mark: int = 0) -> None:
        """Begins at the member at byte `start`, where `file` is."""
        self._file, self._compression, self._name = file, compression, name
        self.passed: int | None = None
        self._mark = mark
        self._decoder: Any = None  # of the member that is read
        self._input, self._taken, self._given = b"", start, 0  # bytes not decoded yet; read of the file; produced
        self._members, self._member_given = 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        if self._given > max(BOMB_FROM, BOMB * self._taken):
            raise ValueError(
                f"{self._name} expands to more than {BOMB} times its size by byte {self._taken}, as no text does: move "
                "it away"
            )
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next(self, most: int) -> bytes:
        """Returns up to `most` bytes; none at the end."""
        while True:
            if self._decoder is None and not self._begin():
                return b""
            ended = False
            if not self._input and self._decoder.needs_input:
                self._fill()
                ended = not self._input
            try:
                data = self._decoder.decompress(self._input, most)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, _zstd_error()) as error:
                raise ValueError(self._damage(error)) from None
            self._input, self._member_given = b"", self._member_given + len(data)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data, None
                if self._compression in PADDED:
                    self._input = self._input.lstrip(b"\0")
            elif ended and not data:
                raise ValueError(
                    f"{self._name} ends in the middle of its {self._compression[1:]} data, at byte {self._taken}: copy "
                    "it again, whole"
                )
            if data:
                return data

    def _begin(self) -> bool:
        """Begins the next member; returns False at the end of the file."""
        while not self._input:
            self._fill()
            if not self._input:
                break
            if self._members and self._compression in PADDED:
                self._input = self._input.lstrip(b"\0")
        place = self._taken - len(self._input)
        if self.passed is None and place >= self._mark:
            self.passed = place
        if not self._input and self._members:
            return False
        self._decoder, self._member_given = _decoder(self._compression, self._name), 0
        self._members += 1
        return True

    def _fill(self) -> None:
        self._input = self._file.read(INPUT)
        self._taken += len(self._input)

    def _damage(self, error: Exception) -> str:
        kind, name, reason = self._compression[1:], self._name, " ".join(str(error).split())
        where = f"before byte {self._taken}"
        if "emory" in reason:
            return f"{name} needs too much memory to be decompressed ({reason}): compress it with a smaller window"
        if self._member_given:
            return f"{name} is damaged: its {kind} data are wrong {where} ({reason}): copy it again"
        if self._members == 1:
            return f"{name} is no {kind} data, or damaged at its beginning ({reason}): rename it or copy it again"
        return f"{name} has something else after its {kind} data, {where} ({reason}): copy it again"


class _Gzip:
    """A decoder of one gzip member, with the methods of those of bz2, lzma and zstd."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, most)


def _decoder(compression: str, name: str) -> Any:
    if compression == ".gz":
        return _Gzip()
    if compression == ".bz2":
        return bz2.BZ2Decompressor()
    if compression == ".xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
    return _zstd(name).ZstdDecompressor()


def _zstd(name: str) -> Any:
    try:
        from backports import zstd
    except ImportError:
        try:
            from compression import zstd  # type: ignore[import-not-found,no-redef]
        except ImportError:
            raise Recoverable(f"{name} needs backports.zstd: pip install 'charlstm[inputs]'") from None
    return zstd


def _zstd_error() -> Any:
    """Returns the exception of zstd, if anything was decompressed with it."""
    import sys

    module = sys.modules.get("backports.zstd") or sys.modules.get("compression.zstd")
    return module.ZstdError if module else zlib.error
