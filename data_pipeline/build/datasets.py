"""Named texts: the standard library's source, and three classic ones from the network."""

import dataclasses
import hashlib
import os
import sysconfig
from pathlib import Path

from data_pipeline.build.downloads import Download, fetch
from data_pipeline.build.sources import Text, find_text, refuse_unreadable, sorted_files
from data_pipeline.progress import Progress

DOWNLOADS = {
    item.name: item
    for item in (
        # The digest is the one that programs in many public repositories, all with this url, check the file against.
        Download(
            name="tinyshakespeare",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            url_bytes=1_115_394,
            bytes=1_115_394,
            algorithm="sha256",
            digest="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        # All of it is published by its author at http://mattmahoney.net/dc/textdata.html ("About the Test Data").
        Download(
            name="enwik8",
            url="http://mattmahoney.net/dc/enwik8.zip",
            url_bytes=36_445_475,
            bytes=100_000_000,
            algorithm="sha1",
            digest="57b8363b814821dc9d47aa4d41f58733519076b2",
        ),
        # The md5 of the unpacked file, as its author gives it; the archive's size is the one that TensorFlow's word2vec
        # tutorial asked for.
        Download(
            name="text8",
            url="http://mattmahoney.net/dc/text8.zip",
            url_bytes=31_344_016,
            bytes=100_000_000,
            algorithm="md5",
            digest="3bea1919949baf155f99411df5fada7e",
        ),
    )
}
NAMES = ("python", *DOWNLOADS)
# Folders left out: tests, installed packages, and two of generated tables (a sixth of the source).
NOT_PYTHON = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip


def named_text(name: str, cache_dir: Path, progress: Progress | None) -> Text:
    """Returns the text of that name, one of `NAMES`.

    Raises:
      ValueError: it cannot be downloaded, or has another digest than the known text.
    """
    if name == "python":
        return standard_library(Path(sysconfig.get_path("stdlib")))
    return find_text(str(fetch(DOWNLOADS[name], cache_dir / "downloads", progress)))


def standard_library(folder: Path) -> Text:
    """Returns the Python source below `folder` without tests, tables and installed packages; each file ends with NUL.

    The files are in the order of a hash of their names, so that the three splits are alike: in the alphabet's order the
    test split is a few modules of the end.
    """
    paths = []
    for directory, folders, files in os.walk(folder, onerror=refuse_unreadable):
        folders[:] = [name for name in folders if name not in NOT_PYTHON]
        found = [Path(directory, name) for name in files if name.endswith(".py")]
        paths += [(path, os.path.realpath(path)) for path in found]
    if not paths:
        raise ValueError(f"this Python has no source in {folder}: name another corpus, such as --corpus=my_texts/")
    sources = [dataclasses.replace(file, ending=b"\0") for file in sorted_files(folder, paths)]
    return Text("python", tuple(sorted(sources, key=lambda file: hashlib.sha256(file.name.encode()).digest())))
