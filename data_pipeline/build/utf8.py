"""Counts and locates characters in UTF-8 text of any length."""

import bisect
import codecs
import collections
import dataclasses
import itertools
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.build.sources import Extent, ParallelMap, Text, TextFile

REGION = 16 << 20  # bytes of a file that are indexed together
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 at which no character starts


@dataclasses.dataclass(frozen=True)
class CharacterIndex:
    """Offsets of the regions of a text: a few numbers per 16 MiB."""

    text: Text
    byte_starts: list[int]  # the last one is the end of the text
    character_starts: list[int]

    @property
    def characters(self) -> int:
        return self.character_starts[-1]

    def byte_offsets(self, positions: Iterable[int]) -> dict[int, int]:
        """Returns the byte offsets of the characters at `positions`."""
        by_region = collections.defaultdict(list)
        for position in sorted(set(positions)):
            by_region[bisect.bisect_right(self.character_starts, position) - 1].append(position)
        offsets = {}
        for region, wanted in by_region.items():
            if region == len(self.byte_starts) - 1:
                offsets[wanted[0]] = self.text.bytes
                continue
            seen, offset = self.character_starts[region], self.byte_starts[region]
            for extent in self.text.extents(offset, self.byte_starts[region + 1]):
                for chunk in extent.read():
                    starts = np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)
                    while wanted and wanted[0] < seen + len(starts):
                        position = wanted.pop(0)
                        offsets[position] = offset + int(starts[position - seen])
                    seen, offset = seen + len(starts), offset + len(chunk)
            assert not wanted
        return offsets

    def regions(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Returns the extents from byte `start` to byte `stop`, both starts of characters, cut where regions start."""
        first, last = bisect.bisect_right(self.byte_starts, start), bisect.bisect_left(self.byte_starts, stop)
        yield from itertools.pairwise([start, *self.byte_starts[first:last], stop])


def index_characters(text: Text, parallel: ParallelMap) -> CharacterIndex:
    """Reads all of `text`.

    Raises:
      ValueError: a file is not UTF-8; the message has the offset of the first bad sequence.
    """
    tasks = [
        (file, region) for file in text.files for region in range(file.start, max(file.bytes, file.start + 1), REGION)
    ]
    byte_starts, character_starts, number = [], [], -1
    position = 0  # in characters
    for (file, region), (skipped, characters) in zip(tasks, parallel(count_characters, tasks), strict=True):
        number += region == file.start
        byte_starts.append(text.starts[number] + region - file.start + skipped)
        character_starts.append(position)
        position += characters + (len(file.ending.decode()) if region + REGION >= file.bytes else 0)
    return CharacterIndex(text, [*byte_starts, text.bytes], [*character_starts, position])


def count_characters(task: tuple[TextFile, int]) -> tuple[int, int]:
    """Returns (bytes before the first character that starts in the region, characters that start in it).

    `task` is the file, and the region's first byte.
    """
    file, region = task
    start, stop = _first_start(file, region), _first_start(file, min(region + REGION, file.bytes))
    characters = sum(map(len, read_characters([Extent(file.path, start, stop)])))
    return start - region, characters


def _first_start(file: TextFile, offset: int) -> int:
    """Returns the first byte from `offset` on at which a character starts: at most `offset` + 3."""
    if offset in (file.start, file.bytes):
        return offset
    with file.path.open("rb") as opened:
        opened.seek(offset)
        after = opened.read(3)
    return offset + next((k for k, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))


def read_characters(extents: Iterable[Extent]) -> Iterator[str]:
    """Yields the characters of `extents`, each of which begins and ends with a whole character.

    Raises:
      ValueError: an extent is not UTF-8; the message has the file and the byte offset of the first bad sequence.
    """
    for extent in extents:
        decoder = codecs.getincrementaldecoder("utf-8")()
        position = extent.start
        for chunk in extent.read():
            held_back = len(decoder.getstate()[0])
            yield _decoded(decoder, chunk, False, extent.path, position - held_back)
            position += len(chunk)
        _decoded(decoder, b"", True, extent.path, position - len(decoder.getstate()[0]))


def _decoded(decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool, path: Path, position: int) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: bad sequence at byte {position + error.start}; convert it from the encoding "
            f"that it has (such as `iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > new.txt`) and name that, "
            "or use --vocabulary=bytes for it"
        ) from None


class Utf8Check:
    """Checks that a stream of bytes is UTF-8.  Raises ValueError, with `name` and the byte, where it is not.

    `position` is that of its first byte in the text.
    """

    def __init__(self, name: str, position: int = 0) -> None:
        self._name, self._position = name, position
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, chunk: bytes, final: bool = False) -> None:
        """Checks the next bytes; `final`: the stream ends with them."""
        held_back = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            position = self._position - held_back + error.start
            raise ValueError(
                f"{self._name} is not UTF-8 text: bad sequence at byte {position} of the text in it; convert it "
                "(`iconv`), or use --vocabulary=bytes for it"
            ) from None
        self._position += len(chunk)


class StartCount:
    """Counts the characters that start in ranges of a text, which may be cut anywhere, even within a character.

    Attributes:
      characters: the count; None if a range is not UTF-8, apart from partial characters at its ends.
    """

    def __init__(self) -> None:
        self.characters: int | None = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.begin()

    def begin(self) -> None:
        """Ends a range and begins another."""
        if self.characters is not None and self._decoder.getstate()[0]:
            self.characters += 1  # it starts here, and ends in another range
        self._decoder.reset()
        self._before = 0  # bytes of a character that started in another range; -1 once one has started in this

    def add(self, chunk: bytes) -> None:
        """Adds the next bytes of the range."""
        if self.characters is None:
            return
        if self._before >= 0:
            started = chunk.lstrip(CONTINUATION)
            self._before += len(chunk) - len(started)
            if self._before > 3:  # no character is that long
                self.characters = None
                return
            if started:
                self._before = -1
            chunk = started
        try:
            self.characters += len(self._decoder.decode(chunk))
        except UnicodeDecodeError:
            self.characters = None


def count_each(extents: list[Extent]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the code points `[n]` of `extents`, in ascending order, and their counts `[n]`."""
    total = np.zeros(0, np.int64)
    for characters in read_characters(extents):
        counts = np.bincount(np.frombuffer(characters.encode("utf-32-le"), "<u4"))
        if len(counts) > len(total):
            counts, total = total, counts
        total[: len(counts)] += counts
    codes = np.flatnonzero(total)
    return codes, total[codes]


def count_all(index: CharacterIndex, spans: Iterable[tuple[int, int]], parallel: ParallelMap) -> dict[int, int]:
    """Returns code point -> its count in `spans` of the text, which are in bytes."""
    regions = (region for span in spans for region in index.regions(*span))
    counts: collections.Counter[int] = collections.Counter()
    for codes, times in parallel(count_each, [index.text.extents(*region) for region in regions]):
        counts.update(dict(zip(codes.tolist(), times.tolist(), strict=True)))
    return dict(counts)
