"""Files that are no text, told by their beginnings: real ones, made here by what makes them."""

import bz2
import contextlib
import gzip
import io
import lzma
import pickle
import py_compile
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.magic import HEAD, kind_of, looks_binary
from data_pipeline.build.prepare import prepare

VERSE = "Under the greenwood tree,\nwho loves to lie with me,\n"
RANDOM = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()


def saved(save, array) -> bytes:
    out = io.BytesIO()
    save(out, array)
    return out.getvalue()


def archived() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty.txt"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("verse.txt", VERSE)
    return out.getvalue()


def database(folder: Path) -> bytes:
    with contextlib.closing(sqlite3.connect(folder / "made")) as connection:
        connection.execute("create table verse (line)")
    return (folder / "made").read_bytes()


def compiled(folder: Path) -> bytes:
    (folder / "made.py").write_text("verse = 1\n")
    return Path(py_compile.compile(str(folder / "made.py"), str(folder / "made.pyc"))).read_bytes()


PNG = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + bytes(13) + zlib.crc32(b"").to_bytes(4, "big")
MADE = {
    "gzip-compressed": lambda folder: gzip.compress(VERSE.encode()),
    "xz-compressed": lambda folder: lzma.compress(VERSE.encode()),
    "lzma-compressed": lambda folder: lzma.compress(VERSE.encode(), lzma.FORMAT_ALONE),
    "bzip2-compressed": lambda folder: bz2.compress(VERSE.encode()),
    "a zip archive": lambda folder: zipped(),
    "a tar archive": lambda folder: archived(),
    "a numpy array": lambda folder: saved(np.save, np.arange(3)),
    "a zip archive (which docx": lambda folder: saved(np.savez, np.arange(3)),
    "a Python pickle": lambda folder: pickle.dumps([1, VERSE]),
    "a SQLite database": database,
    "compiled Python": compiled,
    "an ELF program": lambda folder: Path(sys.executable).resolve().read_bytes()[:9000],
    "text in UTF-16": lambda folder: VERSE.encode("utf-16"),
    "text in UTF-32": lambda folder: VERSE.encode("utf-32"),
    "mostly NUL bytes": lambda folder: b"\0\0\0\x01\0\0\0\x03" * 20,
}
# As their specifications begin.
WRITTEN = {
    "zstd-compressed": b"\x28\xb5\x2f\xfd\x24\x34",
    "lz4-compressed": b"\x04\x22\x4d\x18\x64\x40",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\x04",
    "a rar archive": b"Rar!\x1a\x07\x01\0",
    "a PNG picture": PNG,
    "a JPEG picture": b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01",
    "a GIF picture": b"GIF89a\x01\0\x01\0\x80\0",
    "a WebP picture": b"RIFF\x24\0\0\0WEBPVP8 ",
    "a PDF document": b"%PDF-1.7\n1 0 obj\n<<\n",
    "a Parquet table": b"PAR1\x15\x04\x15\0",
    "an Arrow table": b"ARROW1\0\0\xff\xff\xff\xff",
    "an MP3 recording": b"ID3\x04\0\0\0\0",
    "an MP4 film or recording": b"\0\0\0\x20ftypisom",
    "an Ogg recording": b"OggS\0\x02\0\0",
    "a .DS_Store of macOS": b"\0\0\0\x01Bud1\0\0",
    "a thumbnail database": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0",
    "a safetensors file": b'\x40\0\0\0\0\0\0\0{"__metadata__"',
}


@pytest.mark.parametrize("name", [*MADE, *WRITTEN])
def test_it_is_refused_by_name_whatever_the_vocabulary(name, tmp_path, setting):
    content = MADE[name](tmp_path) if name in MADE else WRITTEN[name] + RANDOM
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(VERSE)
    (tmp_path / "in" / "b").write_bytes(content)
    for vocabulary in ("bytes", "characters"):
        with pytest.raises(ValueError) as caught:
            prepare(setting(tmp_path / "in", vocabulary=vocabulary))
        said = str(caught.value)
        assert f"{tmp_path}/in/b is no text but {name}" in said and "--binary=allow" in said
    prepare(setting(tmp_path / "in", binary="allow"))


TEXTS = {
    "of one letter": b"a",
    "in UTF-8 with a byte-order mark": b"\xef\xbb\xbf" + VERSE.encode(),
    "in Windows-1252": "Gr\u00fc\u00dfe aus K\u00f6ln, \u20ac 5\n".encode("cp1252") * 20,
    "in Windows-1251": "\u044f\u0442\u044c \u0438 \u044e\u0441\n".encode("cp1251") * 20,  # it begins with FF F2
    "in EUC-JP": "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\n".encode("euc-jp") * 20,
    "with a NUL after each name": b"emma\0olivia\0ava\0mia\0" * 20,
    "with the colors of a terminal": b"\x1b[31mred\x1b[0m and plain\n" * 20,
    "of old DOS": b"10 PRINT\r\n20 GOTO 10\r\n\x1a",
    "with a doubled carriage return": b"1\r\r\n2\r\r\n",
    "about pictures": b"GIF89a is a format of pictures, PAR1 one of tables.\n",
    "about fonts": b"OTTO is a name too.\n",
    "about Oracle": b"ORC is a format.\n",
    "of a code page with page breaks": b"one\f\r\ntwo\f\r\n",
    "of PostScript": b"%!PS-Adobe-3.0\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_taken_for_one(name):
    assert kind_of(TEXTS[name]) is None
    assert not looks_binary(TEXTS[name])


def test_what_a_text_may_be_is_nothing_that_is_known():
    found = Path(__file__).resolve().parents[3].rglob("*.py")
    heads = {path: path.read_bytes()[:HEAD] for path in found if ".venv" not in path.parts}
    assert len(heads) > 100 and not any(kind_of(head) or looks_binary(head) for head in heads.values())


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_unicode_of_two_or_four_bytes_is_known_without_a_mark(encoding):
    found = kind_of((VERSE * 100).encode(encoding)[:HEAD])
    assert found and found.name == f"text in {encoding[:6]}" and f"iconv -f {encoding} " in found.remedy
    # Numbers of two or four bytes are none.
    numbers = kind_of(np.arange(1000, dtype=np.int32).tobytes())
    assert numbers and numbers.name == "mostly NUL bytes"


def test_random_bytes_look_binary():
    assert all(looks_binary(RANDOM[start:][:HEAD]) for start in range(0, 900, 100)) and kind_of(RANDOM[:HEAD]) is None


@pytest.mark.skipif(not shutil.which("iconv"), reason="there is no iconv here")
@pytest.mark.parametrize(
    "encoding, vocabulary", [("cp1252", "characters"), ("utf-16", "bytes"), ("utf-16-le", "bytes"), ("utf-32", "bytes")]
)
def test_the_command_that_is_named_makes_utf_8_of_it(encoding, vocabulary, tmp_path, setting, monkeypatch):
    words = "G\u00fcte und Gr\u00f6\u00dfe, with a few more words of ASCII\n" * 20
    path = tmp_path / "an 'old' text.txt"
    path.write_bytes(words.encode(encoding))
    with pytest.raises(ValueError) as caught:
        prepare(setting(path, vocabulary=vocabulary))
    said = str(caught.value)
    command = said.split("`")[1]
    assert command.startswith("iconv ") and "--vocabulary=bytes" not in said.partition(command)[0]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "new.txt").read_text("utf-8") == words
    prepare(setting(tmp_path / "new.txt", vocabulary="characters"))
