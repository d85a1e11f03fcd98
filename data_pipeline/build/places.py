"""Places where a preparation by parts keeps its plan, its notes and its shards until they are a corpus: a directory
that all workers see, or an object store.

Notes appear whole or not at all.  The same note or shard may be written several times: its content is the same.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data_pipeline.atomic_files import atomic_write, locked, sealed, sync, unsealed
from data_pipeline.build.appearing import delete_others, is_complete, is_done, rename
from data_pipeline.build.plan import Plan, first_difference
from data_pipeline.directory import Directory
from data_pipeline.manifest import (
    NAME,
    SOURCES,
    Manifest,
    Source,
    bytes_of,
    lines_of,
    parse_manifest,
    read_manifest,
    write_manifest,
    write_sources,
)
from data_pipeline.stores import Missing, Remote, Store
from data_pipeline.vocabulary import canonical_json

PLAN = "plan.json"
SHARD = re.compile(r"(text|train|valid|test)-(cut-)?\d{5,}-\d{5,}\.(ids|crc)")


class Place(Protocol):
    """A place for the notes and shards of one plan, called by its key."""

    @property
    def store(self) -> Store:
        """Returns the store of the shards."""
        ...

    def is_done(self) -> bool:
        """Returns whether the corpus is there.  Raises ValueError if another one is."""
        ...

    def begin(self, plan: Plan) -> None:
        """Keeps the plan.  Raises ValueError if the preparation that has begun here has another one."""
        ...

    def read(self, note: str) -> bytes | None:
        """Returns a note; None if there is none."""
        ...

    def write(self, note: str, content: bytes) -> None:
        """Writes a note."""
        ...

    def notes(self) -> set[str]:
        """Returns the names of all notes."""
        ...

    def has(self, sizes: dict[str, int]) -> bool:
        """Returns whether all these files of shards are there, with these sizes in bytes."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Yields an empty directory on a disk of this machine, which is deleted afterwards."""
        ...

    def put(self, file: Path) -> None:
        """Takes a file of a shard out of a scratch directory."""
        ...

    def joining(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others from joining the parts meanwhile, as far as the place has locks."""
        ...

    def publish(self, manifest: Manifest, sources: list[Source]) -> None:
        """Makes the shards a corpus, and deletes everything else."""
        ...

    def abandon(self) -> None:
        """Deletes what there is of the preparation; a corpus that has been published stays."""
        ...


class LocalPlace:
    """A directory beside the output, `.<name>.parts`."""

    def __init__(self, output: Path, key: str) -> None:
        self._output, self._key = output, key
        self._all = output.with_name(f".{output.name}.parts")
        self._own = self._all / key[:16]
        self._shards = self._own / "shards"
        self.store = Directory(self._shards)

    def is_done(self) -> bool:
        return is_done(self._output, self._key)

    def begin(self, plan: Plan) -> None:
        begun = sorted(path for path in self._all.glob("*") if path != self._own)
        if begun:
            other = unsealed(begun[0] / PLAN)
            raise ValueError(_another(plan, other, str(self._all)))
        self._shards.mkdir(parents=True, exist_ok=True)
        if self.read(PLAN) is None:
            self.write(PLAN, canonical_json(plan.content()))

    def read(self, note: str) -> bytes | None:
        return unsealed(self._own / note)

    def write(self, note: str, content: bytes) -> None:
        with atomic_write(self._own / note) as out:
            out.write(sealed(content))

    def notes(self) -> set[str]:
        return {path.name for path in self._own.glob("*.json")}

    def has(self, sizes: dict[str, int]) -> bool:
        paths = [(self._shards / name, size) for name, size in sizes.items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=self._own, ignore_cleanup_errors=True) as directory:
            yield Path(directory)

    def put(self, file: Path) -> None:
        sync(file)
        os.replace(file, self._shards / file.name)

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        with locked(self._output.with_name(f".{self._output.name}.lock"), lambda: None):
            if is_complete(self._shards, self._key):  # a join was killed before it renamed them
                self._finish(read_manifest(self._shards))
            yield

    def publish(self, manifest: Manifest, sources: list[Source]) -> None:
        write_sources(self._shards, sources)
        write_manifest(self._shards, manifest)
        self._finish(manifest)

    def _finish(self, manifest: Manifest) -> None:
        delete_others(self._shards, manifest)
        rename(self._shards, self._output)
        delete_others(self._output, manifest)  # what another process has put there meanwhile
        self.abandon()

    def abandon(self) -> None:
        shutil.rmtree(self._own, ignore_errors=True)
        with contextlib.suppress(OSError):  # another preparation has begun there
            self._all.rmdir()


class RemotePlace:
    """The directory of an object store that is to be the corpus; notes are below `.parts/` in it."""

    def __init__(self, url: str, key: str, patience: float, scratch: Path) -> None:
        self.store = Remote(url, patience)
        self._key, self._scratch = key, scratch
        self._parts, self._own = ".parts/", f".parts/{key[:16]}/"

    def _published(self) -> Manifest | None:
        try:
            return parse_manifest(bytes(self.store.read(NAME)), self.store.path(NAME))
        except Missing:
            return None

    def is_done(self) -> bool:
        found = self._published()
        if found is None:
            return False
        if found.key != self._key:
            raise ValueError(
                f"{self.store.path(NAME)} is of another text or settings (key {found.key[:16]} instead of "
                f"{self._key[:16]}): delete it or name another output"
            )
        return True

    def begin(self, plan: Plan) -> None:
        begun = [name for name in self._names() if name.startswith(self._parts)]
        if others := sorted(name for name in begun if not name.startswith(self._own) and name.endswith(PLAN)):
            raise ValueError(_another(plan, bytes(self.store.read(others[0])), self.store.path(self._parts)))
        self.write(PLAN, canonical_json(plan.content()))

    def read(self, note: str) -> bytes | None:
        try:
            return bytes(self.store.read(self._own + note))
        except Missing:
            return None

    def write(self, note: str, content: bytes) -> None:
        self.store.create(self._own + note, content)

    def notes(self) -> set[str]:
        return {name.removeprefix(self._own) for name in self._names() if name.startswith(self._own)}

    def has(self, sizes: dict[str, int]) -> bool:
        try:
            return all(self.store.size(name) == size for name, size in sizes.items())
        except Missing:
            return False

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as made:
            directory = Path(made)
            with locked(directory.with_name(f".{directory.name}.lock"), lambda: None):  # `cache.clear` leaves it alone
                yield directory

    def put(self, file: Path) -> None:
        self.store.upload(file.name, file)
        file.unlink()

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        yield

    def publish(self, manifest: Manifest, sources: list[Source]) -> None:
        with self.scratch() as directory:
            (directory / SOURCES).write_bytes(lines_of(sources))
            self.put(directory / SOURCES)
        if self.store.create(NAME, bytes_of(manifest)) or self.is_done():
            self._delete(self._names(), kept=manifest.shard_files())

    def abandon(self) -> None:
        names, found = self._names(), self._published()  # in this order: whoever publishes meanwhile keeps all
        self._delete(names, kept=found.shard_files() if found else set())

    def _names(self) -> list[str]:
        try:
            return [one.name for one in self.store.objects()]
        except Missing:  # some servers make a bucket when something is put into it
            return []

    def _delete(self, names: list[str], kept: set[str]) -> None:
        gone = [name for name in names if name.startswith(self._own) or (SHARD.fullmatch(name) and name not in kept)]
        if gone:
            self.store.delete(gone)


def _another(plan: Plan, other: bytes | None, where: str) -> str:
    why = first_difference(plan.content(), other) if other else "its plan cannot be read"
    return (
        f"the preparation that has begun in {where} has another plan ({why}): give the same command again, with the "
        f"inputs as they were, or delete {where} to begin anew"
    )
