"""Copies a prepared corpus into an object store."""

from pathlib import Path

from data_pipeline.manifest import NAME, SOURCES, Manifest, parse_manifest, read_manifest
from data_pipeline.progress import Progress
from data_pipeline.stores import PATIENCE, Missing, Remote

PROBE = ".writable"


def check_writable(url: str, patience: float = PATIENCE) -> None:
    """Writes an empty object at `url` and deletes it, so that hours of work do not end at a store that takes nothing.

    Does nothing where a corpus is already.

    Raises:
      ValueError: there is no such bucket, or nothing may be written there.
      Unreachable: the store does not answer.
    """
    store = Remote(url, patience)
    try:
        store.size(NAME)
    except Missing:
        store.create(PROBE, b"")
        store.delete([PROBE])


def upload(directory: Path, url: str, patience: float = PATIENCE, progress: Progress | None = None) -> bool:
    """Copies the prepared corpus in `directory` to `url`; returns False if it is there already.

    The manifest comes last, and only where there is none, so that a copy that was broken off is no corpus, and of two
    that meet, one wins.  The same call again begins anew.

    Raises:
      ValueError: there is another corpus, or nothing may be written there.
      Unreachable: the store does not answer.
    """
    store, manifest = Remote(url, patience), read_manifest(directory)
    if _is_there(store, manifest):
        return False
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    names = [name for shard in shards for name in (shard.file, shard.checksums)] + [SOURCES] * bool(
        manifest.sources.files
    )
    for done, name in enumerate(names):
        store.upload(name, directory / name)
        if progress:
            progress("uploading", done + 1, len(names))
    return store.create(NAME, (directory / NAME).read_bytes()) or not _is_there(store, manifest)


def _is_there(store: Remote, manifest: Manifest) -> bool:
    """Raises ValueError if there is another corpus."""
    path = store.path(NAME)
    try:
        found = parse_manifest(bytes(store.read(NAME)), path)
    except Missing:
        return False
    if found != manifest:
        raise ValueError(
            f"{path} is of another text or settings (key {found.key[:16]} instead of {manifest.key[:16]}): delete "
            "it or name another output"
        )
    return True
