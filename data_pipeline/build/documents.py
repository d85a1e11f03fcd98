"""Reads documents from files of text that hold many of them: JSON lines, CSV, dumps of MediaWiki."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

from data_pipeline.build.decompress import COMPRESSIONS

DOCUMENT_BYTES = 64 << 20  # of the longest document, and of the longest line
CHUNK = 1 << 20

ENDINGS = {f".{form}": form for form in ("jsonl", "csv", "parquet", "arrow", "xml")} | {".ndjson": "jsonl"}
MEDIAWIKI = "mediawiki"
TEXT = [MEDIAWIKI, "page", "revision", "text"]  # in a revision's <content> is the text of other slots


class Kind(NamedTuple):
    """The form and the compression of a file, which choose its reader."""

    form: str  # text, which is one document, or a key of READERS
    compression: str  # one of COMPRESSIONS, or ""

    @property
    def is_plain(self) -> bool:
        """Returns whether the file is its text, byte for byte."""
        return self == PLAIN


PLAIN = Kind("text", "")


def kind_of_name(name: str, form: str = "auto") -> Kind:
    """Returns the kind of a file by the endings of its name, and by `form` if it is not auto."""
    lower = name.lower()
    compression = next((one for one in COMPRESSIONS if lower.endswith(one)), "")
    ending = re.search(r"\.[^./]*$", lower.removesuffix(compression))
    return Kind(form if form != "auto" else ENDINGS.get(ending.group() if ending else "", "text"), compression)


class BadDocuments:
    """Handles documents that cannot be used: they are refused, or left out and counted.

    Attributes:
      count: how many were left out.
      first: description of the first of them, or "".
    """

    def __init__(self, name: str, unit: str, drop: bool) -> None:
        self.count, self.first = 0, ""
        self._name, self._unit, self._drop = name, unit, drop

    def add(self, number: int, problem: str, shown: str | bytes = "") -> None:
        """Adds document `number`; raises ValueError, unless such documents are left out."""
        letters = shown.decode("utf-8", "replace") if isinstance(shown, bytes) else shown
        begins = f", begins {letters[:80]!r}" if letters else ""
        sentence = f"{self._name}, {self._unit} {number}: {problem}{begins}"
        if not self._drop:
            raise ValueError(f"{sentence}: mend it, or leave such documents out with --bad_documents=drop")
        self.count, self.first = self.count + 1, self.first or sentence


# Yields (number, document), counted from 1 in units of the form.
Documents = Iterator[tuple[int, str | bytes]]


def read_lines(
    file: BinaryIO, name: str, field: str, bad: BadDocuments, span: tuple[int, int] | None = None
) -> Documents:
    """Yields the string in `field` of each line, which is a JSON object; skips empty lines.

    Args:
      span: the bytes of a larger file whose lines these are; a byte-order mark is left out at its beginning alone.
    """
    begins = not (span and span[0])
    for number, line in _lines(file, bad):
        try:
            text = line.decode("utf-8-sig" if begins and number == 1 else "utf-8")
            if not text or text.isspace():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            bad.add(number, f"not UTF-8 at byte {error.start} of the line", line)
            continue
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            bad.add(number, f"not JSON ({reason})", line)
            continue
        if isinstance(record, dict) and isinstance(record.get(field), str):
            yield number, record[field]
        else:
            bad.add(number, _no_field(record, field), line)


def _no_field(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return "a JSON value that is no object with fields"
    if field in record:
        return f"field {field!r} is not a string"
    names = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"no field {field!r} but {names} (--text_field chooses)"


def _lines(file: BinaryIO, bad: BadDocuments) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(DOCUMENT_BYTES):
        number += 1
        if len(line) == DOCUMENT_BYTES and not line.endswith(b"\n"):
            bad.add(number, f"a line of more than {DOCUMENT_BYTES:,} bytes", line[:400])
            while (line := file.readline(DOCUMENT_BYTES)) and not line.endswith(b"\n"):
                pass
            continue
        yield number, line


def read_csv(file: BinaryIO, name: str, field: str, bad: BadDocuments) -> Documents:
    """Yields the column `field`, named in the first row, of each row of comma-separated values (RFC 4180)."""
    csv.field_size_limit(DOCUMENT_BYTES)
    rows = csv.reader(_text_lines(file, name), strict=True)
    row_began = 1
    try:
        header = next(rows, [])
        if field not in header:
            names = ", ".join(map(repr, header[:8])) or "none"
            raise ValueError(
                f"{name} has no column {field!r} but {names}: name the column with --text_field, or read the file as "
                "it is with --input_kind=text"
            )
        place = header.index(field)
        row_began = rows.line_num + 1
        for row in rows:
            if len(row) == len(header):
                yield row_began, row[place]
            elif row:  # an empty line is no row
                bad.add(row_began, f"{len(row)} values where the first row has {len(header)}", ",".join(row)[:400])
            row_began = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name}, line {row_began}: no row of values ({error}): mend its quotes, or shorten it"
        ) from None


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    held, number = b"", 1  # bytes of a line that has not ended, and its number
    while True:
        chunk = file.read(CHUNK)
        block = held + chunk
        stop = block.rfind(b"\n") + 1 if chunk else len(block)
        block, held = block[:stop], block[stop:]
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            line, before = number + block.count(b"\n", 0, error.start), block.rfind(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{name}, line {line}: not UTF-8 at byte {error.start - before} of the line: convert the file (`iconv`)"
            ) from None
        yield from io.StringIO(text.removeprefix("\ufeff") if number == 1 else text, newline="\n")
        number += block.count(b"\n")
        if len(held) > DOCUMENT_BYTES:
            raise ValueError(f"{name}, line {number}: a line of more than {DOCUMENT_BYTES:,} bytes: mend it")
        if not chunk:
            return


class _Pages:
    """Collects the texts of a dump's pages from an expat parser."""

    def __init__(self, parser: Any, name: str, bad: BadDocuments) -> None:
        self.ready: list[tuple[int, str]] = []
        self._parser, self._name, self._bad = parser, name, bad
        self._within: list[str] = []
        self._text: list[str] | None = None
        self._bytes, self._number = 0, 0
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._add
        parser.XmlDeclHandler = self._require_utf8
        # Dumps declare none; declared entities could expand without a bound.
        parser.StartDoctypeDeclHandler = lambda *_: self._refuse("declares a document type")

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self._name}, line {self._parser.CurrentLineNumber}: {why}, as no dump of MediaWiki does: read it as it "
            "is with --input_kind=text, or leave it out with --exclude"
        )

    def _require_utf8(self, version: str, encoding: str | None, standalone: int) -> None:
        """Refuses other encodings: a part of a dump is read without what is declared at its beginning."""
        if encoding and encoding.lower() != "utf-8":
            self._refuse(f"declares the encoding {encoding[:40]}")

    def _start(self, element: str, _: dict[str, str]) -> None:
        if not self._within and element != MEDIAWIKI:
            self._refuse(f"begins with <{element[:40]}>")
        self._within.append(element)
        if element == "page":
            self._number, self._text = self._number + 1, None
        elif self._within == TEXT:
            self._text, self._bytes = [], 0  # the last revision of several counts

    def _end(self, element: str) -> None:
        self._within.pop()
        if element == "page" and self._text is not None and self._bytes:
            if self._bytes > DOCUMENT_BYTES:
                self._bad.add(self._number, f"a text of more than {DOCUMENT_BYTES:,} bytes")
            else:
                self.ready.append((self._number, "".join(self._text)))

    def _add(self, data: str) -> None:
        if self._text is not None and self._within == TEXT:
            self._bytes += len(data.encode())
            if self._bytes <= DOCUMENT_BYTES:
                self._text.append(data)


def read_mediawiki(file: BinaryIO, name: str, field: str, bad: BadDocuments) -> Documents:
    """Yields the text of each page of a MediaWiki dump in XML, of its last revision if there are several."""
    parser = expat.ParserCreate()
    parser.buffer_text, parser.buffer_size = True, CHUNK
    pages = _Pages(parser, name, bad)
    try:
        while chunk := file.read(CHUNK):
            parser.Parse(chunk, False)
            yield from pages.ready
            pages.ready.clear()
        parser.Parse(b"", True)
        yield from pages.ready
    except expat.ExpatError as error:
        raise ValueError(
            f"{name}, line {error.lineno}: no whole XML ({expat.ErrorString(error.code)}): copy it again"
        ) from None
