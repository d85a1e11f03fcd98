"""Where parts are prepared: in processes of this machine, or on a Dask cluster.  The only file that knows Dask."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.atomic_files import expand_user
from data_pipeline.build.encode import mapping, parallel_map
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
        try:
            with parallel_map(workers, processes, progress) as parallel:
                yield parallel
        except concurrent.futures.BrokenExecutor:
            raise ChildProcessError(
                "a process of the preparation was killed, perhaps for want of memory: the same command goes on; "
                "--workers chooses fewer"
            ) from None
        return
    kind, _, address = name.partition(":")
    if kind != "dask" or not address:
        raise ValueError(f"engine={name!r} is neither local nor dask:ADDRESS, such as dask:tcp://host:8786")
    with _dask(address) as pool:
        yield mapping(pool, progress)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[concurrent.futures.Executor]:
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
        client = distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConnectionError(f"no Dask scheduler answers at {address} ({reason}): start one") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ConnectionError(f"the Dask scheduler at {address} has no workers: start `dask worker`") from None
        yield _Pool(client.get_executor(pure=False, retries=ATTEMPTS), distributed.KilledWorker)


class _Pool(concurrent.futures.Executor):
    """Dask's executor; an error that a worker raises is not tried again, one that kills it is."""

    def __init__(self, pool: concurrent.futures.Executor, killed: type[Exception]) -> None:
        self._pool, self._killed = pool, killed

    def map(self, function: Callable[..., Any], *items: Any, timeout: Any = None, chunksize: int = 1) -> Iterator[Any]:
        try:
            for error, result in self._pool.map(functools.partial(_attempt, function), *items):
                if error is not None:
                    raise error
                yield result
        except self._killed as error:
            reason = " ".join(str(error).split())[:160]
            raise ConnectionError(f"workers of Dask died again and again ({reason}): see their logs") from None


def _attempt(function: Callable[..., Any], *items: Any) -> tuple[Exception | None, Any]:
    """Returns an error instead of raising it."""
    try:
        return None, function(*items)
    except (ValueError, OSError) as error:
        return error, None
