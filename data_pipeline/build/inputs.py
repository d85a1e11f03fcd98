"""Finds the texts that settings name, chooses among their files and inspects them."""

import dataclasses
import difflib
import fnmatch
import glob
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.datasets import NAMES, named_text
from data_pipeline.build.documents import kind_of_name
from data_pipeline.build.inspection import look_at, refuse_binary, remarks
from data_pipeline.build.remote_inputs import find_remote, matches
from data_pipeline.build.sources import NoSuchText, Text, TextFile, find_text, glob_base
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings
from data_pipeline.stores import is_remote

# What Hugging Face's datasets have beside their tables.
BESIDE_TABLES = ("readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_texts(
    settings: CorpusSettings, cache: Path, workers: int, progress: Progress | None
) -> tuple[dict[str, Text], str, int]:
    """Returns the texts ready to be decoded, a description of them in one line, and how many files look binary.

    The texts are split -> its text, for explicit files; else "" -> the text to be cut into splits.

    Raises:
      ValueError: a text does not exist, is in two splits, or has a binary file that is not allowed.
    """
    texts = {split: _chosen(text, settings) for split, text in _named_or_found(settings, cache, progress).items()}
    _refuse_shared(texts)
    plain = [file for text in texts.values() for file in text.files if file.kind.is_plain and not file.is_remote]
    looks = look_at(plain, settings.file_separator_bytes(), cache / "memo", workers)
    if settings.binary == "refuse":
        refuse_binary(plain, looks)
    by_file = dict(zip((file.identity for file in plain), looks, strict=True))
    words, found, binary = [], {}, 0
    for split, text in texts.items():
        files, odd = [], []
        for file in text.files:
            if look := by_file.get(file.identity):
                file = dataclasses.replace(file, start=look.start, separated=look.separated)
                odd += [file.name] if look.kind or look.looks_binary else []
            files.append(file)
        found[split] = dataclasses.replace(text, files=tuple(files))
        words.append(f"{split or settings.corpus}: {remarks(text, odd)}")
        binary += len(odd)
    return found, "; ".join(words), binary


def would_contain(spec: str, folder: Path, names: Iterable[str]) -> bool:
    """Returns whether files of these `names`, once they are in `folder`, belong to the text that `spec` names."""
    if spec in NAMES or is_remote(spec):
        return False
    path, folder = expand_user(spec), folder.resolve()
    if path.is_dir():
        return folder.is_relative_to(path.resolve())
    base = glob_base(path)
    if not glob.has_magic(spec) or path.exists() or not folder.is_relative_to(base.resolve()):
        return False
    below, pattern = folder.relative_to(base.resolve()).parts, path.parts[len(base.parts) :]
    is_hidden = any(part.startswith(".") for part in below)  # no wildcard matches it
    return not is_hidden and any(matches((*below, *name.split("/")), pattern) for name in names)


def _chosen(text: Text, settings: CorpusSettings) -> Text:
    """Returns the text with the kinds of its files, and without those that the settings exclude."""
    include, exclude = (_patterns(spec) for spec in (settings.include, settings.exclude))
    files, left_out = [], list(text.left_out)
    for file in text.files:
        if (include and not _match(file.name, include)) or _match(file.name, exclude):
            left_out.append(f"{file.name}, by --{'exclude' if _match(file.name, exclude) else 'include'}")
        else:
            kind = kind_of_name(file.name, settings.input_kind) if not file.ending else file.kind
            files.append(dataclasses.replace(file, kind=kind))
    if not include:
        tables = [PurePosixPath(file.name) for file in files if file.kind.form in ("parquet", "arrow", "jsonl")]
        folders = {folder for table in tables for folder in table.parents}
        beside = {file.identity for file in files if _describes_tables(PurePosixPath(file.name), folders)}
        left_out += [f"{file.name}, beside tables" for file in files if file.identity in beside]
        files = [file for file in files if file.identity not in beside]
    if not files:
        raise ValueError(
            f"{text.name} has no files left of {len(left_out)} with include={settings.include!r} and "
            f"exclude={settings.exclude!r}: change these"
        )
    return dataclasses.replace(text, files=tuple(files), left_out=tuple(left_out))


def _describes_tables(name: PurePosixPath, folders: set[PurePosixPath]) -> bool:
    """Returns whether a file is one that datasets have beside their tables; `folders` have tables in or below them."""
    return name.name.lower() in BESIDE_TABLES and name.parent in folders


def _patterns(spec: str) -> list[str]:
    return [pattern.strip() for pattern in spec.split(",") if pattern.strip()]


def _match(name: str, patterns: list[str]) -> bool:
    """Returns whether a file's name, or its last part, matches one of the globs."""
    return any(fnmatch.fnmatchcase(part, one) for one in patterns for part in (name, name.rpartition("/")[2]))


def _named_or_found(settings: CorpusSettings, cache: Path, progress: Progress | None) -> dict[str, Text]:
    def find(spec: str) -> Text:
        return find_remote(spec, settings.remote_patience) if is_remote(spec) else find_text(spec)

    if settings.train:
        if settings.split != "contiguous":
            raise ValueError(f"split={settings.split} cuts one text: it cannot be used with explicit --train files")
        specs = {"train": settings.train, "valid": settings.valid, "test": settings.test}
        return {split: find(spec) for split, spec in specs.items() if spec}
    if settings.corpus in NAMES:
        return {"": named_text(settings.corpus, cache, progress)}
    near = difflib.get_close_matches(settings.corpus, NAMES, 1)
    try:
        return {"": find(settings.corpus)}
    except NoSuchText as error:
        raise NoSuchText(f"{error}" + (f" (or did you mean the corpus named {near[0]}?)" if near else "")) from None


def _refuse_shared(texts: dict[str, Text]) -> None:
    """Raises ValueError if a file is in two splits: held-out text would be trained on."""
    of: dict[object, tuple[str, TextFile]] = {}
    for split, text in texts.items():
        for file in text.files:
            first, other = of.setdefault(file.identity, (split, file))
            if first != split:
                raise ValueError(
                    f"{file.shown} of --{split} is {other.shown} of --{first} as well: name it in one of them only"
                )
