"""Turns text into a prepared corpus:  python -m data_pipeline.prepare --input='books/*.txt' --output=data/books"""

if __name__ == "__main__":  # before what takes long to import
    from data_pipeline import startup

    startup.attach("prepare", "; the same command goes on")

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from data_pipeline.encoding import SMALL, parallel_map, plan, write_splits
from data_pipeline.files import DISK_ERRORS, Meter, Progress, at_home, locked, sync_directory, written_whole
from data_pipeline.inputs import find_texts
from data_pipeline.manifest import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    SHARD_BYTES,
    Manifest,
    Source,
    is_prepared,
    read_manifest,
    write_manifest,
)
from data_pipeline.named import NAMES
from data_pipeline.progress import bar, say_on_stderr
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from data_pipeline.texts import Text, hash_files
from data_pipeline.vocabulary import canonical_json


def prepare(
    settings: CorpusSettings,
    output: Path | None = None,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Path:
    """The prepared directory of the text that `settings` name; does nothing where it is there already.

    What is written does not depend on the number of workers.  Until it is complete it lies in a hidden directory beside
    `output`, from which a preparation that was killed is continued.

    Args:
      settings: the text, the vocabulary, the splits, the cache.
      output: where to; None: in the cache, under a name that has a digest of the text and the settings.
      progress: told what is being done, how much of it is done and how much there is.
      say: told in one line, where there is work, what the text is.
      workers: threads or processes; 0: one for each core.
      shard_bytes, block_bytes: sizes of a shard and of what is under one checksum.

    Raises:
      ValueError: there is no such text, it cannot be prepared so, or `output` holds something else.
    """
    cache = at_home(settings.cache_dir)
    workers = workers or _cores()
    texts, described = find_texts(settings, cache, workers, progress)
    processes = sum(text.bytes for text in texts.values()) > SMALL
    files = [file for text in texts.values() for file in text.files]
    digests = hash_files(files, cache / "memo", workers, progress)
    key = _key(texts, digests, settings, [shard_bytes, block_bytes])
    output = at_home(output or cache / "corpora" / f"{_label(texts)}-{key[:16]}").absolute()
    if _is_done(output, key):
        return output
    for text in texts.values():
        inside = text.folders.intersection(map(str, output.resolve().parents))
        if inside:
            # The corpus would be text for the next one.
            raise ValueError(f"{output} lies inside of the input {min(inside)}: name an output outside of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    waiting = Meter(progress, f"waiting for another preparation of {output}", 0)
    with locked(output.with_name(f".{output.name}.lock"), lambda: waiting.add(0)):
        if _is_done(output, key):
            return output
        if say:
            say(f"preparing {described}")
        # The workers come to rest before the partial directory is left.
        with contextlib.ExitStack() as writing, parallel_map(workers, processes, progress) as parallel:
            vocabulary, plans = plan(texts, settings, shard_bytes, parallel)
            partial = writing.enter_context(_partial_directory(output, key))
            splits = write_splits(partial, vocabulary, plans, block_bytes, parallel("writing"))
            for text in texts.values():
                text.check_unchanged()
        sources = (Source(file.name, file.bytes, digest) for file, digest in zip(files, digests, strict=True))
        _publish(partial, output, Manifest(vocabulary, splits, tuple(sources), key, block_bytes))
    return output


def _key(texts: dict[str, Text], digests: list[str], settings: CorpusSettings, sizes: list[int]) -> str:
    """A digest, in hex, of all that the files to be written depend on."""
    rest = iter(digests)
    content = {
        split: [[next(rest), file.start, file.ending.hex()] for file in text.files] for split, text in texts.items()
    }
    how: list[object] = [settings.vocabulary]
    if settings.vocabulary == "characters":
        how.append(settings.min_count)
    if "" in texts:
        how += [settings.split, settings.valid_fraction, settings.test_fraction]
    return hashlib.sha256(canonical_json([FORMAT_VERSION, content, how, sizes])).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _label(texts: dict[str, Text]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "", next(iter(texts.values())).name)[:32] or "text"


def _is_done(output: Path, key: str) -> bool:
    """Whether `output` is the corpus of that key.  Raises ValueError where it is something else."""
    if is_prepared(output):
        found = read_manifest(output).key
        if found != key:
            raise ValueError(
                f"{output} is a corpus of another text or other settings (key {found[:16]} instead of {key[:16]}): "
                "delete it or name another output"
            )
        open_corpus(output)
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not a prepared corpus: delete it or name another output")
    return False


@contextlib.contextmanager
def _partial_directory(output: Path, key: str) -> Iterator[Path]:
    """The directory to write in, empty or with whole shards of the same preparation.

    It stays where the block is stopped, and goes where the block refuses the text.
    """
    partial = output.with_name(f".{output.name}.partial")
    owner = partial / "key"
    if not (owner.is_file() and owner.read_bytes() == key.encode()):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        with written_whole(owner) as out:
            out.write(key.encode())
    else:
        for torn in partial.glob("*.new"):  # what was being written at a kill
            torn.unlink()
    try:
        yield partial
    except ValueError:  # the text has changed: what was written is not what the key says
        shutil.rmtree(partial)
        raise


def _publish(partial: Path, output: Path, manifest: Manifest) -> None:
    """Makes the complete corpus appear at `output`, by renaming its directory."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    kept = {shard.file for shard in shards} | {shard.checksums for shard in shards}
    for path in partial.iterdir():
        if path.name not in kept:
            path.unlink()
    write_manifest(partial, manifest)
    try:
        os.replace(partial, output)
    except OSError:
        if not _is_done(output, manifest.key):
            raise
        shutil.rmtree(partial)
    sync_directory(output.parent)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the option that was meant."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            hint = _nearest(unknown[1].split("=")[0], options, 0.4)
            hint = hint if unknown[1].startswith("-") else ": a glob must be quoted"
            message = f"unknown argument {unknown[1]}{hint}"
        self.fail(2, message)

    def fail(self, status: int, message: str) -> NoReturn:
        wipe = "\r\033[K" if sys.stderr.isatty() else ""  # of a progress bar that was cut short
        self.exit(status, f"{wipe}prepare: {' '.join(message.split())}\n")


def _nearest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff)
    return f": did you mean {near[0]}?" if near else ""


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(choices)}{_nearest(value, choices)}")
        return value

    return parse


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m data_pipeline.prepare",
        description="Turn text into a corpus.",
        allow_abbrev=False,
        add_help=False,  # it has two names, and here four
    )
    parser.add_argument("-h", "--help", "--helpshort", "--helpfull", action="help", help="Print this.")
    parser.add_argument(
        "--input",
        dest="corpus",
        default="",
        metavar="TEXT",
        help="A text file, a quoted glob or a directory of text files; or a name: " + ", ".join(NAMES) + ".",
    )
    parser.add_argument("--output", required=True, help="The directory to make; its parents are made too.")
    parser.add_argument("--workers", type=int, default=0, help="Threads or processes; 0: one for each core.")
    parser.add_argument("--verify", action="store_true", help="Read the prepared corpus again and compare its sha256.")
    for field in dataclasses.fields(CorpusSettings):
        if field.name != "corpus":
            _add_setting(parser, field)
    return parser


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    text = field.metadata["help"].replace("%", "%%").replace("--corpus", "--input")
    choices = field.metadata["choices"]
    kind: Callable[[str], object] = _one_of(choices) if choices else type(field.default)
    parser.add_argument(
        f"--{field.name}",
        type=kind,
        default=field.default,
        metavar=f"{{{','.join(choices)}}}" if choices else field.name.upper(),
        help=f"{text}  Default: {field.default!r}.",
    )


def main(arguments: list[str]) -> None:
    """Prepares, verifies, or both.

    Where it cannot, it says why in one line on stderr.  Exit statuses: 2 a mistake in flags or files; 74 the disk is
    full or fails; 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    output, workers, verify = (options.pop(name) for name in ("output", "workers", "verify"))
    if not output:
        parser.error("--output is empty: name the directory to make")
    if options["corpus"] and options["train"]:
        parser.error("--input and --train are both given: leave one out")
    progress, done = bar(), []
    try:
        output = at_home(output)
        if options["corpus"] or options["train"]:
            there = is_prepared(output)
            prepare(CorpusSettings(**options), output, progress, say=say_on_stderr, workers=workers)
            done.append("already prepared" if there else "prepared")
        elif not verify:
            parser.error("--input, or --train, must name a text")
        if verify:
            verify_corpus(output, progress)
            done.append("verified")
        corpus = open_corpus(output)
    except (ValueError, OSError) as error:
        parser.fail(74 if isinstance(error, OSError) and error.errno in DISK_ERRORS else 2, str(error))
    sizes = ", ".join(f"{name} {len(split)}" for name, split in corpus.splits.items())
    vocabulary = f"{corpus.vocabulary.size} symbols in the vocabulary"
    print(f"{' and '.join(done)}: {output}, {vocabulary}, {sizes}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
