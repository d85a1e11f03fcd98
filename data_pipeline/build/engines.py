"""Engines that prepare parts: in processes of this machine, or on a Dask cluster.  The only file that knows Dask."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.encode import parallel_map
from data_pipeline.build.sources import ParallelMap
from data_pipeline.progress import Progress

ATTEMPTS = 3  # at a part whose worker dies
CONNECT_SECONDS = 30


@contextlib.contextmanager
def engine(
    name: str, workers: int, processes: bool, progress: Progress | None
) -> Iterator[Callable[[str], ParallelMap]]:
    """Yields parallel(description) -> a map over the workers of an engine.

    Args:
      name: `local`, or `dask:` and an address or a scheduler file.
      workers: of `local`: threads or processes.
      processes: of `local`: whether they are processes.
      progress: called as by `parallel_map`.

    Raises:
      ValueError: there is no such engine, or what a worker raises.
      ChildProcessError: a process of this machine was killed.
      ConnectionError: the scheduler does not answer or has no workers, or its workers die again and again.
    """
    if name == "local":
        with parallel_map(workers, processes, progress) as parallel:
            yield parallel
        return
    kind, _, address = name.partition(":")
    if kind != "dask" or not address:
        raise ValueError(f"engine={name!r} is neither local nor dask:ADDRESS, such as dask:tcp://host:8786")
    with _dask(address) as client:

        def reported(doing: str, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            items = list(items)
            for number, result in enumerate(_mapped(client, function, items), 1):
                if progress:
                    progress(doing, number, len(items))
                yield result

        yield lambda doing: lambda function, items: reported(doing, function, items)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Any]:
    """Yields a client of a scheduler that has workers."""
    try:
        import distributed
    except ImportError:
        raise ValueError(f"engine=dask:{address} needs distributed: pip install 'charlstm[cluster]'") from None
    where: dict[str, Any] = {"address": address}
    if "://" not in address and not address.rpartition(":")[2].isdecimal():
        file = expand_user(address)
        if not file.is_file():
            raise ValueError(f"{file} is no scheduler file: start `dask scheduler --scheduler-file {file}`")
        where = {"scheduler_file": str(file)}
    try:
        client = distributed.Client(**where, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConnectionError(f"no Dask scheduler answers at {address} ({reason}): start one") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ConnectionError(f"the Dask scheduler at {address} has no workers: start `dask worker`") from None
        yield client


def _mapped(client: Any, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields function(item) of each item, in order; waits for what is running before it raises an error.

    A task whose worker dies is tried again, one that raises is not.
    """
    import distributed

    ahead = 2 * sum(client.nthreads().values())
    waiting, running, results = iter(enumerate(items)), distributed.as_completed(), dict[int, Any]()
    numbers: dict[Any, int] = {}

    def submit() -> None:
        for number, item in itertools.islice(waiting, 1):
            future = client.submit(_attempt, function, item, pure=False, retries=ATTEMPTS)
            numbers[future] = number
            running.add(future)

    for _ in range(ahead):
        submit()
    following = 0
    try:
        for future in running:
            number = numbers.pop(future)
            error, results[number] = future.result()
            if error is not None:
                raise error
            submit()
            while following in results:
                yield results.pop(following)
                following += 1
    except distributed.KilledWorker as killed:
        reason = " ".join(str(killed).split())[:160]
        raise ConnectionError(f"workers of Dask died again and again ({reason}): see their logs") from None
    except (ValueError, OSError):
        for future in numbers:
            future.exception()
        raise


def _attempt(function: Callable[[Any], Any], item: Any) -> tuple[Exception | None, Any]:
    """Returns an error instead of raising it."""
    try:
        return None, function(item)
    except (ValueError, OSError) as error:
        return error, None
