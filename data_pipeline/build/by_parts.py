"""Prepares a corpus by parts: on many machines, each part by any of them, with one result."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.atomic_files import Recoverable, expand_user
from data_pipeline.build.appearing import real
from data_pipeline.build.encode import SMALL
from data_pipeline.build.engines import engine
from data_pipeline.build.inputs import find_texts
from data_pipeline.build.join import join_counts, join_parts, missing_counts, missing_parts
from data_pipeline.build.parts import PartTask, count_part, write_part
from data_pipeline.build.places import LocalPlace, Place, RemotePlace
from data_pipeline.build.plan import PART_BYTES, Plan, Share, make_plan
from data_pipeline.build.prepare import cores, refuse_inside, remarks, vocabulary_of
from data_pipeline.build.sources import ParallelMap
from data_pipeline.manifest import BLOCK_BYTES, SHARD_BYTES
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings

HELP_AFTER = 20.0  # seconds without news of other workers, after which one does their parts
POLL = 2.0  # seconds between looks at what they have done


class Sizes(NamedTuple):
    """Sizes that the result depends on, in bytes."""

    part: int = PART_BYTES  # of the input
    shard: int = SHARD_BYTES
    block: int = BLOCK_BYTES


USUAL = Sizes()


def prepare_by_parts(
    settings: CorpusSettings,
    output: Path | str,
    progress: Progress | None = None,
    *,
    name: str = "local",
    share: Share | None = None,
    only_join: bool = False,
    say: Callable[[str], None] = lambda line: None,
    workers: int = 0,
    sizes: Sizes = USUAL,
) -> bool:
    """Prepares the text that `settings` name, or a share of its parts; returns whether the corpus is there then.

    The files do not depend on workers, engines, shares and their order.  What is killed is done again by the same call.

    Args:
      settings: the text, the vocabulary, the splits.
      output: the directory, or its URL in an object store.
      progress: called with a description, the amount done and the total.
      name: the engine, as `engines.engine` takes it.
      share: the parts of this worker; the one that finds all parts done joins them.  None: all parts.
      only_join: prepare no part.
      say: called with lines that describe the text and the work.
      workers: threads or processes on this machine; 0: one per core.
      sizes: of parts, shards and blocks.

    Raises:
      ValueError: the text does not exist or does not suit the settings, or is not that of the preparation that has
        begun; a part is missing; `output` holds something else.
    """
    cache, workers = expand_user(settings.cache_dir), workers or cores()
    texts, described, _ = find_texts(settings, cache, workers, progress)
    of_other = vocabulary_of(settings)
    plan = make_plan(texts, settings, of_other, sizes)
    place = _place(output, plan.key, settings, cache)
    if place.is_done():
        place.abandon()  # what a kill after the join has left
        return True
    if isinstance(output, Path):
        refuse_inside(texts, settings, output.absolute())
    may_abandon, is_large = False, sum(text.bytes for text in texts.values()) > SMALL
    try:
        with engine(name, workers, is_large, progress) as parallel:
            work = _Work(plan, place, share, parallel, progress)
            if only_join:
                if not place.notes():
                    raise ValueError(f"no preparation of this text and these settings has begun at {output}: start it")
                return work.join(say)
            place.begin(plan)
            may_abandon = share is None  # of several workers, the others go on
            for line in (_preparing(described, len(plan.parts), share), *remarks(texts, settings, of_other)):
                say(line)
            return work.run(say)
    except (FileNotFoundError, ValueError) as error:
        if place.is_done():  # another worker has joined the parts meanwhile, and deleted what was looked for
            return True
        if may_abandon and isinstance(error, ValueError) and not isinstance(error, Recoverable):
            place.abandon()
        raise


def _preparing(described: str, parts: int, share: Share | None) -> str:
    of = f", worker {share.number} of {share.of}" if share else ""
    return f"preparing {described}; {parts} part{'s' * (parts > 1)}{of}"


def _place(output: Path | str, key: str, settings: CorpusSettings, cache: Path) -> Place:
    if isinstance(output, Path):
        return LocalPlace(real(output), key)
    return RemotePlace(output, key, settings.remote_patience, cache / "parts")


class _Work:
    """The work of one call: its parts, and the join."""

    def __init__(
        self,
        plan: Plan,
        place: Place,
        share: Share | None,
        parallel: Callable[[str], ParallelMap],
        progress: Progress | None,
    ) -> None:
        self._plan, self._place, self._share, self._parallel = plan, place, share, parallel
        self._report = progress or (lambda doing, done, total: None)
        kind, how = plan.settings.vocabulary, plan.how
        self._tasks = [PartTask(part, place, how, kind, plan.shard_bytes, plan.block_bytes) for part in plan.parts]
        self._own = self._tasks[share.number :: share.of] if share else self._tasks

    def run(self, say: Callable[[str], None]) -> bool:
        if self._plan.settings.vocabulary == "characters":
            list(self._parallel("counting")(count_part, self._own))
            self._wait_for_counts()
            join_counts(self._plan, self._tasks, self._place, self._parallel("counting"))
        list(self._parallel("writing")(write_part, self._own))
        missing = missing_parts(self._plan, self._place)
        if self._place.is_done():
            return True
        if missing and self._share:
            say(f"prepared {len(self._own)} of {len(self._tasks)} parts; {len(missing)} are still missing")
            return False
        return self.join(say)

    def join(self, say: Callable[[str], None]) -> bool:
        """Joins the parts, unless another worker has."""
        with self._place.joining():
            if not self._place.is_done():
                bad, first_bad = join_parts(self._plan, self._tasks, self._place)
                if bad:
                    say(f"left out {bad:,} bad documents, the first: {first_bad}")
        return True

    def _wait_for_counts(self) -> None:
        """Waits until all parts have been counted.  Those of workers that do not come are counted here."""
        seen, quiet_since = None, time.monotonic()
        while missing := missing_counts(self._plan, self._place):
            if self._place.is_done():
                raise FileNotFoundError("the counts are gone, as another worker has joined the parts")
            if seen is not None and len(missing) != seen:
                quiet_since = time.monotonic()
            seen = len(missing)
            if time.monotonic() - quiet_since >= HELP_AFTER:
                assert self._share
                # Each worker begins elsewhere, so that few do the same.
                number = missing[self._share.number * len(missing) // self._share.of]
                with contextlib.suppress(FileNotFoundError):
                    count_part(self._tasks[number])
                seen -= 1
                continue
            total = len(self._tasks)
            self._report("waiting for the counts of others", total - len(missing), total)
            time.sleep(POLL)
