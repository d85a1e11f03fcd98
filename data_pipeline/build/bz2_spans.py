"""Reads the documents of a span of a .bz2 file of many streams, without what is before the span.

A stream begins at a whole byte, with marks by which it is found.  A span has the streams that begin in it, and the
documents that begin in these: what is before the first document belongs to the spans before, and the last document is
read to its end in the streams that follow.  So spans side by side have every document once, wherever streams end.
"""

import bz2
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.build.decompress import INPUT, Decompressed
from data_pipeline.build.documents import MEDIAWIKI
from data_pipeline.build.sources import CHUNK, TextFile

MARK = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")  # the header of a stream, and that of a block or of its end
MARK_BYTES = 10


class _Boundary(NamedTuple):
    """The mark at which documents of one form begin, and the bytes that make some of them a whole file."""

    mark: bytes
    kept: int  # bytes of the mark that belong to the document before
    before: bytes = b""
    after: bytes = b""


# No page of a dump has a < within; where another text has this mark within an element, the part is no whole XML.
BOUNDARIES = {
    "jsonl": _Boundary(b"\n", 1),
    "xml": _Boundary(b"<page>", 0, f"<{MEDIAWIKI}>".encode(), f"</{MEDIAWIKI}>".encode()),
}


def first_stream(raw: Any, start: int, stop: int) -> int:
    """Returns where the first stream begins in bytes `start` to `stop` of a file; `stop` if none does."""
    held = b""
    while start < stop:
        raw.seek(start + len(held))
        chunk = raw.read(CHUNK)
        held += chunk
        for match in MARK.finditer(held):
            found = start + match.start()
            if found >= stop or _decodes(raw, found):
                return min(found, stop)
        if not chunk:
            break
        rest = max(len(held) - MARK_BYTES + 1, 0)
        start, held = start + rest, held[rest:]
    return stop


def _decodes(raw: Any, place: int) -> bool:
    """Returns whether a stream that begins there gives text, or its end: the mark might be within another stream."""
    raw.seek(place)
    decoder = bz2.BZ2Decompressor()
    while not decoder.eof and (data := raw.read(INPUT)):
        try:
            if decoder.decompress(data, 1):
                return True
        except OSError:  # the decoder's word for damage; errors of the file are raised
            return False
    return decoder.eof


class Bz2Span(io.RawIOBase):
    """The documents that begin in a span of a .bz2 file, as a file that is read from its beginning to its end.

    Raises ValueError, in one sentence, if the file is damaged, or if a stream seems to begin within another one.
    """

    def __init__(self, raw: BinaryIO, file: TextFile) -> None:
        assert file.span and file.kind.compression == ".bz2"
        self._raw, self._name, self._boundary = raw, file.shown, BOUNDARIES[file.kind.form]
        self._start, self._stop = file.span
        self._text, self._left = self._documents(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            text = next(self._text, None)
            if text is None:
                return 0
            self._left = memoryview(text)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _documents(self) -> Iterator[bytes]:
        """Yields the text from the first document of the span to the first one after it."""
        mark, kept, before, after = self._boundary
        begun, held = not self._start, b""  # the last bytes, in which a mark may begin
        least = 0  # how many of them are of the span
        if not begun:
            yield before
        for text, is_after in self._streams():
            text = held + text
            least = least if is_after else len(text)
            if not begun:
                found = text.find(mark)
                if found < 0:
                    rest = max(len(text) - len(mark) + 1, 0)
                    held, least = text[rest:], max(least - rest, 0)
                    if least or not is_after:
                        continue
                if not 0 <= found < least:
                    break  # the next document begins after the span
                begun, text, least = True, text[found + kept :], max(least - found - kept, 0)
            if not is_after:
                yield text
                held, least = b"", 0
                continue
            found = text.find(mark, least)
            if found >= 0:
                yield text[: found + kept]
                break
            rest = max(len(text) - len(mark) + 1, least)
            held, least = text[rest:], 0
            yield text[:rest]
        else:
            if begun:  # up to the end of the file
                yield held
                return
        yield after

    def _streams(self) -> Iterator[tuple[bytes, bool]]:
        """Yields the text of the streams that begin in the span, and of those after it: text, whether it is after."""
        start = first_stream(self._raw, self._start, self._stop) if self._start else 0
        if start == self._stop:
            return
        self._raw.seek(start)
        streams = Decompressed(self._raw, ".bz2", self._name, start, self._stop)
        is_after = False
        while text := streams.read(CHUNK):
            if streams.passed is not None and not is_after:
                self._require_first(streams.passed)
                is_after = True
            yield text, is_after
        if not is_after:
            assert streams.passed is not None
            self._require_first(streams.passed)

    def _require_first(self, place: int) -> None:
        """Raises ValueError unless the next span, which looks for its first stream, finds the one that begins there."""
        position = self._raw.tell()
        found = first_stream(self._raw, self._stop, place)
        if found != place:
            raise ValueError(
                f"{self._name} cannot be cut at byte {found}, where a bz2 stream begins within another one: prepare it "
                "with another --part_bytes, or without parts"
            )
        self._raw.seek(position)
