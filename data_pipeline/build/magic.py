"""Recognises binary files by their first bytes."""

import re
from typing import NamedTuple

HEAD = 4096  # bytes of a file that are inspected
VERSION = 1  # of the results: a new one makes all files be inspected again
MOSTLY_NUL = 0.5  # fraction of the bytes
BINARY_CONTROLS, BINARY_NULS = (
    0.05,
    0.25,
)  # fractions above which a file looks binary; 0.1 of random bytes are such control characters
WHITE = b"\t\n\v\f\r\x1a\x1b"  # those that texts have: white space, DOS's end of a file, the escapes of terminals
CONTROLS = bytes(set(range(1, 32)) - set(WHITE)) + b"\x7f"  # NUL is counted separately: it may separate texts
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8


class Kind(NamedTuple):
    """A kind of binary file."""

    name: str  # such as "a PNG picture"
    remedy: str  # what to do with it; {} stands for its name


def _unpack(name: str, command: str) -> Kind:
    return Kind(f"{name} data", f"decompress it (`{command} {{}}`)")


def _archive(name: str, command: str) -> Kind:
    return Kind(name, f"unpack it (`{command} {{}}`) and move it away")


def _encoded(encoding: str) -> Kind:
    return Kind(f"text in {encoding[:6]}", f"convert it (`iconv -f {encoding} -t UTF-8 {{}} > new.txt`)")


def _other(name: str) -> Kind:
    return Kind(name, "move it away")


def _table(name: str) -> Kind:
    return Kind(name, "write its text to a file of its own, and move it away")


# Regular expressions of beginnings.  Sources: magic/Magdir of https://github.com/file/file, and the formats' own pages.
KNOWN: list[tuple[bytes, Kind]] = [
    (rb"\x1f\x8b\x08", _unpack("gzip-compressed", "gzip -d")),
    (rb"\x1f\x9d", _unpack("compress-compressed", "gzip -d")),
    (rb"\x28\xb5\x2f\xfd", _unpack("zstd-compressed", "zstd -d --rm")),
    (rb"\xfd7zXZ\0", _unpack("xz-compressed", "xz -d")),
    (rb"\x5d\0\0.{7}\xff\xff", _unpack("lzma-compressed", "xz -d")),
    (rb"LZIP\x01", _unpack("lzip-compressed", "lzip -d")),
    (rb"BZh[1-9]1AY&SY", _unpack("bzip2-compressed", "bzip2 -d")),
    (rb"\x04\x22\x4d\x18", _unpack("lz4-compressed", "lz4 -d --rm")),
    (rb"\xff\x06\0\0sNaPpY", _unpack("snappy-compressed", "snzip -d")),
    (
        rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
        _archive("a zip archive (which docx, epub, npz and PyTorch's are)", "unzip"),
    ),
    (rb"7z\xbc\xaf\x27\x1c", _archive("a 7z archive", "7z x")),
    (rb"Rar!\x1a\x07", _archive("a rar archive", "unrar x")),
    (rb".{257}ustar(?:\0|  \0)", _archive("a tar archive", "tar -xf")),
    (rb"MSCF\0\0\0\0", _archive("a cabinet archive", "cabextract")),
    (rb"\x89PNG\r\n\x1a\n", _other("a PNG picture")),
    (rb"\xff\xd8\xff", _other("a JPEG picture")),
    (rb"RIFF.{4}WEBP", _other("a WebP picture")),
    (rb"BM.{4}\0{4}", _other("a BMP picture")),
    (rb"II\*\0|MM\0\*", _other("a TIFF picture")),
    (rb"\0\0\x01\0", _other("an icon")),
    (rb"8BPS\0\x01", _other("a Photoshop picture")),
    (rb"%PDF-", Kind("a PDF document", "write its text to a file (`pdftotext {}`) and move it away")),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _other("a thumbnail database or an old Office document (OLE)")),
    (rb"\0\0\0\x01Bud1", _other("a .DS_Store of macOS")),
    (rb"bplist0", _other("a property list of macOS")),
    (rb"ARROW1\0\0", _table("an Arrow table")),
    (rb"\xff{4}.{2}\0\0\x10\0\0\0", _table("an Arrow stream")),
    (rb"Obj\x01", _table("an Avro table")),
    (rb"SQLite format 3\0", _table("a SQLite database")),
    (rb"\x89HDF\r\n\x1a\n", _table("an HDF5 file")),
    (rb"\x93NUMPY", _other("a numpy array")),
    (rb"\x80[\x02-\x05]", _other("a Python pickle")),
    (rb".{5}\0{3}\{\"", _other("a safetensors file")),
    (rb"\x7fELF", _other("an ELF program")),
    (rb"MZ\x90\0", _other("a Windows program")),
    (rb"[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe\0\0", _other("a program of macOS or Java")),
    (rb"\0asm\x01\0\0\0", _other("WebAssembly")),
    (rb"ID3[\x02-\x04]\0", _other("an MP3 recording")),
    (rb"OggS\0", _other("an Ogg recording")),
    (rb"fLaC\0", _other("a FLAC recording")),
    (rb"RIFF.{4}WAVE", _other("a WAVE recording")),
    (rb"RIFF.{4}AVI ", _other("an AVI film")),
    (rb"\x1a\x45\xdf\xa3", _other("a Matroska or WebM film")),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", _encoded("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", _encoded("UTF-16")),
]
# A text may begin with these as well: they count only if control characters follow.
WORDS: list[tuple[bytes, Kind]] = [
    (rb".[\x0c-\x0e]\r\n", _other("compiled Python")),
    (rb"\xff[\xf2\xf3\xfa\xfb]", _other("an MP3 recording")),
    (rb"GIF8[79]a", _other("a GIF picture")),
    (rb"PAR1", _table("a Parquet table")),
    (rb"ORC", _table("an ORC table")),
    (rb"FEA1", _table("a Feather table")),
    (rb"GGUF", _other("a GGUF model")),
    (rb".{4}ftyp", _other("an MP4 film or recording")),
    (rb"wOF[F2]|OTTO", _other("a font")),
]
_KNOWN, _WORDS = (re.compile(b"|".join(b"(%b)" % row[0] for row in table), re.DOTALL) for table in (KNOWN, WORDS))


def kind_of(head: bytes) -> Kind | None:
    """Returns the kind of the file with the first bytes `head`, up to `HEAD` of them; None if it may be text."""
    return (
        _begins(head, KNOWN, _KNOWN)
        or (_begins(head, WORDS, _WORDS) if b"\0" in head or _controls(head) else None)
        or _unmarked_unicode(head)
        or (_other("mostly NUL bytes") if head and head.count(b"\0") >= MOSTLY_NUL * len(head) else None)
    )


def looks_binary(head: bytes) -> bool:
    """Returns whether `head` has more control characters than text has, which is no proof."""
    return _controls(head) > BINARY_CONTROLS * len(head) or head.count(b"\0") > BINARY_NULS * len(head)


def _begins(head: bytes, table: list[tuple[bytes, Kind]], pattern: re.Pattern[bytes]) -> Kind | None:
    found = pattern.match(head)
    return table[found.lastindex - 1][1] if found and found.lastindex else None


def _controls(head: bytes) -> int:
    return len(head) - len(head.translate(None, CONTROLS))


def _unmarked_unicode(head: bytes) -> Kind | None:
    """Recognises UTF-16 or UTF-32 without a byte-order mark, if most of it is ASCII."""
    nuls = head.count(b"\0")
    for encoding, width in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
        if len(head) < 2 * width or nuls < 0.6 * len(head) * (width - 1) / width:
            continue
        whole = head[: len(head) - len(head) % width]
        letters = whole.decode(encoding, "replace")
        if sum(letter.isascii() and (letter.isprintable() or letter.isspace()) for letter in letters) > 0.6 * len(
            letters
        ):
            return _encoded(encoding)
    return None
