"""The directory of a corpus: it appears whole, and a preparation that was killed goes on in a hidden one beside it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.atomic_files import Recoverable, atomic_write, sync
from data_pipeline.manifest import NAME, SOURCES, Manifest, is_prepared, read_manifest
from data_pipeline.new_directory import fixed, is_taken
from data_pipeline.shards import open_corpus


def real(output: Path) -> Path:
    """Returns the absolute path of an output; of a link, which no directory can replace, that of what it leads to."""
    return Path(os.path.realpath(output)) if output.is_symlink() else output.absolute()


def is_done(output: Path, key: str) -> bool:
    """Returns whether `output` is the corpus of that key.  Raises ValueError if it is something else."""
    if is_prepared(output):
        found = read_manifest(output).key
        if found != key:
            raise ValueError(
                f"{output} is a corpus of another text or other settings (key {found[:16]} instead of {key[:16]}): "
                "delete it or name another output"
            )
        open_corpus(output)
        return True
    if why := fixed(output):
        raise ValueError(f"{output} {why}")
    if is_taken(output):
        raise ValueError(f"{output} exists and is not a prepared corpus: delete it or name another output")
    return False


def is_complete(partial: Path, key: str) -> bool:
    """Returns whether `partial` has all files of the corpus of that key."""
    with contextlib.suppress(ValueError):
        if read_manifest(partial).key == key:
            open_corpus(partial).read_sources()
            return True
    return False


@contextlib.contextmanager
def kept_if_interrupted(partial: Path, key: str) -> Iterator[None]:
    """Makes the directory to write to, empty or with complete shards of the same preparation.

    It stays if the block is interrupted, or cannot go on for now, and is removed if the block refuses the text.
    """
    owner = partial / "key"
    if not (owner.is_file() and owner.read_bytes() == key.encode()):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        with atomic_write(owner) as out:
            out.write(key.encode())
    else:
        for torn in partial.glob("*.new"):  # files being written when a preparation was killed
            torn.unlink()
    try:
        yield
    except ValueError as error:
        if not isinstance(error, Recoverable):  # the text has changed, or will be: the files do not belong to its key
            shutil.rmtree(partial)
        raise


def publish(partial: Path, output: Path, key: str) -> None:
    """Makes the complete corpus in `partial` appear at `output`; killed anywhere, it can be called again."""
    delete_others(partial, read_manifest(partial))
    try:
        rename(partial, output)
    except OSError:
        if not is_done(output, key):
            raise
        shutil.rmtree(partial)


def delete_others(directory: Path, manifest: Manifest) -> None:
    """Deletes all files of a directory that are not of the corpus."""
    kept = {NAME, SOURCES, *manifest.shard_files()}
    for path in directory.iterdir():
        if path.name not in kept:
            path.unlink()
    sync(directory)


def rename(directory: Path, output: Path) -> None:
    """Renames a directory to `output`, which is named if it cannot be."""
    try:
        os.replace(directory, output)
    except OSError as error:
        error.filename, error.filename2 = os.fspath(output), None
        raise
    sync(output.parent)
