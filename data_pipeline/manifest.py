"""Reads and writes `manifest.json`, the table of contents of a prepared corpus, specified by docs/data_format.md."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic_files import atomic_write
from data_pipeline.vocabulary import Vocabulary, canonical_json

FORMAT_VERSION = 4
IDS_VERSION = 1  # part of the fingerprint that runs are checked against: the ids are those of format 1
NAME, SOURCES = "manifest.json", "sources.jsonl"
SPLITS = ("train", "valid", "test")
BLOCK_BYTES = 16 * 1024  # of shard data per checksum
SHARD_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of ids."""

    file: str  # name in the corpus directory; its checksums are in the same name with .crc for .ids
    symbols: int
    sha256: str  # of the whole file, in hex
    checksums_sha256: str  # of the file of its checksums, in hex

    @property
    def checksums(self) -> str:
        """Returns the name of the checksum file."""
        return str(Path(self.file).with_suffix(".crc"))


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """The shards of one split, in the order of the text."""

    symbols: int
    bytes: int  # of the original text
    characters: int | None  # code points that start in it; None if it is not UTF-8
    unknown: int  # number of symbols that are not in the vocabulary
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that the corpus was made from."""

    name: str  # relative to the input; never an absolute path
    bytes: int
    sha256: str | None  # in hex; None if the file was in an object store
    etag: str | None = None  # of an object of a store
    documents: int = 1


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """A summary of `sources.jsonl`, which has a line for each file that the corpus was made from."""

    files: int
    bytes: int
    documents: int
    sha256: str  # of `sources.jsonl`, in hex


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    vocabulary: Vocabulary
    splits: dict[str, SplitRecord]
    sources: SourceSummary = SourceSummary(0, 0, 0, hashlib.sha256(b"").hexdigest())
    key: str = ""  # digest of the sources' content and of the settings
    block_bytes: int = BLOCK_BYTES
    split: str = "contiguous"  # as the setting; "files" if each split is a text of its own
    document_separator: str = ""  # as the setting; "" if documents are not separated
    bad_documents: int = 0  # left out

    @property
    def fingerprint(self) -> str:
        """Returns the sha256, in hex, of the canonical JSON of everything that determines the ids."""
        splits = {name: [[s.symbols, s.sha256] for s in split.shards] for name, split in self.splits.items()}
        identity = {"format_version": IDS_VERSION, "vocabulary": self.vocabulary.to_json(), "splits": splits}
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    def shard_files(self) -> set[str]:
        """Returns the names of the shards and of their checksums."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        return {shard.file for shard in shards} | {shard.checksums for shard in shards}

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of `manifest.json`, which ends with the digest of the rest."""
        tree = {
            "format": "charlstm corpus",
            "format_version": FORMAT_VERSION,
            "vocabulary": self.vocabulary.to_json(),
            "dtype": self.vocabulary.dtype.name,
            "block_bytes": self.block_bytes,
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
            "sources": dataclasses.asdict(self.sources),
            "split": self.split,
            "document_separator": self.document_separator,
            "bad_documents": self.bad_documents,
            "key": self.key,
            "fingerprint": self.fingerprint,
        }
        return tree | {"sha256": hashlib.sha256(canonical_json(tree)).hexdigest()}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, which makes `directory` a prepared corpus: the shards must be on disk already."""
    with atomic_write(directory / NAME) as file:
        file.write(bytes_of(manifest))


def bytes_of(manifest: Manifest) -> bytes:
    """Returns the content of `manifest.json`."""
    return json.dumps(manifest.to_json(), indent=1).encode("ascii") + b"\n"


def write_sources(directory: Path, sources: Sequence[Source]) -> None:
    """Writes `sources.jsonl`, a line for each source."""
    with atomic_write(directory / SOURCES) as file:
        file.write(lines_of(sources))


def summary(sources: Sequence[Source]) -> SourceSummary:
    """Returns what the manifest has of the sources."""
    size, documents = (sum(getattr(source, name) for source in sources) for name in ("bytes", "documents"))
    return SourceSummary(len(sources), size, documents, hashlib.sha256(lines_of(sources)).hexdigest())


def lines_of(sources: Sequence[Source]) -> bytes:
    """Returns the content of `sources.jsonl`."""
    return b"".join(canonical_json(vars(source)) + b"\n" for source in sources)


def parse_sources(data: bytes, summary: SourceSummary, path: str) -> list[Source]:
    """Returns the sources that `data`, the content of `sources.jsonl`, has.

    Raises:
      ValueError: it is not what the manifest says; the message has `path`.
    """
    if hashlib.sha256(data).hexdigest() != summary.sha256:
        raise ValueError(f"{path} is damaged or of another corpus: delete the corpus and prepare it again")
    return [Source(**json.loads(line)) for line in data.splitlines()]


def is_prepared(directory: Path) -> bool:
    """Returns whether `directory` has a manifest."""
    return (directory / NAME).is_file()


def has_shards(directory: Path) -> bool:
    """Returns whether `directory` holds shards, of a whole corpus or not."""
    return any(ids.with_suffix(".crc").is_file() for ids in directory.glob("*.ids"))


def corpora_among(names: Collection[str]) -> set[str]:
    """Returns the folders of these files that hold shards, as `has_shards`; "" for files without a folder."""
    return {name.rpartition("/")[0] for name in names if name.endswith(".ids") and f"{name[:-4]}.crc" in names}


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of the prepared corpus in `directory`.

    Raises:
      ValueError: it is absent, of another version, or damaged.
    """
    path = directory / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{directory} is not a prepared corpus: it has no {NAME}") from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Returns the manifest that `data` is.  Raises ValueError, naming `path`, as `read_manifest`."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the corpus and prepare it again") from None
    if not isinstance(tree, dict) or tree.get("format") != "charlstm corpus":
        raise ValueError(f"{path}: not the manifest of a prepared corpus")
    try:
        return _manifest(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: delete the corpus and prepare it again") from None


def _manifest(tree: dict[str, Any]) -> Manifest:
    if tree.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format version {tree.get('format_version')!r}, and this program reads {FORMAT_VERSION}")
    splits, sources, counts = (
        _field(tree, "splits", dict),
        _field(tree, "sources", dict),
        ("files", "bytes", "documents"),
    )
    manifest = Manifest(
        vocabulary=Vocabulary.from_json(_field(tree, "vocabulary", dict)),
        splits={name: _split(name, _field(splits, name, dict)) for name in splits},
        sources=SourceSummary(
            **{name: _field(sources, name, int) for name in counts}, sha256=_digest(sources, "sha256")
        ),
        key=_field(tree, "key", str),
        block_bytes=_field(tree, "block_bytes", int),
        split=_field(tree, "split", str),
        document_separator=_field(tree, "document_separator", str),
        bad_documents=_field(tree, "bad_documents", int),
    )
    dtype, width = _field(tree, "dtype", str), manifest.vocabulary.dtype
    if dtype != width.name:
        raise ValueError(f"dtype {dtype!r}, where {manifest.vocabulary.size} symbols need {width.name}")
    if manifest.block_bytes < 1 or manifest.block_bytes % width.itemsize:
        raise ValueError(f"block_bytes={manifest.block_bytes} is not a positive multiple of {width.itemsize}")
    contents = manifest.to_json()
    for name in ("fingerprint", "sha256"):
        if _field(tree, name, str) != contents[name]:
            raise ValueError(
                f"the {name} {tree[name]!r} is not that of the contents, {contents[name]}, the file was changed"
            )
    return manifest


def _split(name: str, tree: dict[str, Any]) -> SplitRecord:
    if name not in SPLITS:
        raise ValueError(f"split {name!r} is not one of {', '.join(SPLITS)}")
    shards = []
    for shard in _field(tree, "shards", list):
        file = _field(shard, "file", str)
        # A name with a slash in it could name a file outside of the corpus.
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.ids", file):
            raise ValueError(f"{file!r} is not the name of a shard")
        digests = _digest(shard, "sha256"), _digest(shard, "checksums_sha256")
        shards.append(Shard(file, _field(shard, "symbols", int), *digests))
    characters = None if tree.get("characters", "") is None else _field(tree, "characters", int)
    counts = _field(tree, "symbols", int), _field(tree, "bytes", int), characters, _field(tree, "unknown", int)
    record = SplitRecord(*counts, tuple(shards))
    if record.symbols != sum(shard.symbols for shard in shards) or any(shard.symbols < 1 for shard in shards):
        raise ValueError(f"the shards of split {name} do not add up to its {record.symbols} symbols")
    return record


def _digest(tree: Any, name: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", _field(tree, name, str)):
        raise ValueError(f"{name}={tree[name]!r} is not a sha256 in hex")
    return tree[name]


def _field(tree: Any, name: str, kind: type) -> Any:
    value = tree.get(name) if isinstance(tree, dict) else None
    if type(value) is not kind:
        raise ValueError(f"field {name!r} is missing or not a json {kind.__name__}")
    return value
