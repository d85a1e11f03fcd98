"""Joins a process to the others of its job, and ends it when one of them is lost."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from charlstm import distributed
from data_pipeline import signals
from data_pipeline.settings import check_choices, setting
from launch.support import cli

ALIKE = 5.0  # seconds within which all processes end if they end for the same reason


@dataclasses.dataclass(frozen=True)
class JobFlags:
    """The processes of one job, started by launch.local or a cluster.  A single process needs none of these."""

    cluster: str = setting(
        "none",
        "auto: join the processes started by Slurm, Open MPI or Kubernetes, by JAX's own detection.",
        choices=("none", "auto"),
    )
    coordinator: str = setting(
        "",
        "HOST:PORT of process 0, if the processes are started in another way.  The port has no password: localhost is "
        "reached from this machine alone, any other belongs in a private network.",
    )
    num_processes: int = setting(1, "Number of processes of the job, with --coordinator.")
    process_id: int = setting(0, "Number of this process, from 0, with --coordinator.")
    heartbeat_timeout: int = setting(
        20, "Seconds without a heartbeat after which a process counts as lost, and the others end."
    )

    @property
    def has_others(self) -> bool:
        return self.cluster == "auto" or self.num_processes > 1

    def __post_init__(self) -> None:
        check_choices(self)
        if self.cluster == "auto" and self.coordinator:
            raise ValueError(f"--cluster=auto and --coordinator={self.coordinator} are both given: leave one out")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process_id={self.process_id} must be from 0 to {self.num_processes - 1} (num_processes)")
        if self.num_processes > 1 and not self.coordinator:
            raise ValueError(f"num_processes={self.num_processes} needs --coordinator=HOST:PORT; launch.local gives it")
        if self.heartbeat_timeout < 1:
            raise ValueError(f"heartbeat_timeout={self.heartbeat_timeout} must be at least 1")


def join(chosen: JobFlags) -> None:
    """Joins the job, before anything asks for devices.  Raises ValueError if no cluster is found."""
    if chosen.cluster == "auto":
        distributed.join_cluster(chosen.heartbeat_timeout)
    elif chosen.coordinator:
        distributed.join(chosen.coordinator, chosen.num_processes, chosen.process_id, chosen.heartbeat_timeout)
    if chosen.has_others:
        signals.cede(signal.SIGTERM)  # JAX tells the others of it


@contextlib.contextmanager
def leaving(chosen: JobFlags) -> Iterator[None]:
    """Ends this process, where an error within it must not wait for the other processes of the job."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if chosen.has_others and distributed.is_peer_failure(error):
            exit_peer_lost(error)
        if chosen.has_others:
            exit_alone(error)
        raise


def exit_alone(error: Exception) -> None:
    """Exits at once, unless all processes are failing too; then it returns.

    A normal exit of this process alone would block in JAX's shutdown, as the others wait for this one, and then end
    them as if this one had died.
    """
    if distributed.exit_barrier(ALIKE):
        return
    status = cli.explain("launch.train", error)
    sys.stderr.flush()
    os._exit(status)


def exit_peer_lost(error: Exception) -> NoReturn:
    """Exits at once because another process was lost: a normal exit would wait for the others."""
    sentence = " ".join(str(error).split())
    print(
        f"another process of the job was lost ({sentence[:200]}): start the job again, and it goes on", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(cli.LOST)
