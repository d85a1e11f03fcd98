"""How processes agree, and how the loss of another one is told from what has gone wrong in this one."""

import errno
import os
import socket
import subprocess
import sys

import jax
import pytest

from charlstm import distributed
from tests.conftest import ROOT

LOST = [
    ValueError("UNKNOWN: Gloo all-reduce failed: [external/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
    ValueError("process 1: UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
    jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"),
    jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error"),
    jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: the coordination service does not answer"),
]
NOT_LOST = [
    BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), "/data/text.txt"),  # "Resource temporarily unavailable"
    OSError(errno.EIO, os.strerror(errno.EIO), "/data/gloo/text.txt"),
    ValueError('UNAVAILABLE: Error writing "/heartbeat/0": [OS error 11: EAGAIN Resource temporarily unavailable]'),
    ValueError("/data/nccl/text.txt was changed while it was prepared"),
    ValueError("process 1: [Errno 11] Resource temporarily unavailable: '/data/text.txt'"),
    RuntimeError("can't start new thread: Resource temporarily unavailable"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_what_collectives_and_the_coordination_service_raise_tells_of_a_lost_process(error):
    assert distributed.is_peer_failure(error)


@pytest.mark.parametrize("error", NOT_LOST, ids=str)
def test_what_a_disk_or_this_process_raises_does_not(error):
    assert not distributed.is_peer_failure(error)


AGREE = """
import errno, sys
from pathlib import Path
from charlstm import distributed
from data_pipeline.atomic_files import InUse
from data_pipeline.stores import Unreachable

class Counted:
    def __init__(self, client):
        self.client, self.calls = client, 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.client, name)

index, count, port = map(int, sys.argv[1:])
distributed.join(f"127.0.0.1:{port}", count, index, 60)
distributed.make()  # the devices ask for the client, too
state = distributed.distributed.global_state
state.client = counted = Counted(state.client)
for meeting in range(20):
    words = distributed.all_gather_str(f"{meeting} of {index}")
    assert words == [f"{meeting} of {process}" for process in range(count)], words
print(counted.calls)
state.client = counted.client

if index == 0:  # where it listens: on the loopback (127.0.0.1, as the kernel writes it), and nowhere else
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    print({row[1].partition(":")[0][-8:] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")})

def fail(error):
    if index == 1:
        raise error

for error in (OSError(errno.ENOSPC, "full", "x"), Unreachable("silent"), InUse("held"), ValueError("bad")):
    try:
        distributed.run_on_all(lambda: fail(error))
    except distributed.FAILURES as told:
        assert getattr(told, "errno", None) == getattr(error, "errno", None), told
        assert isinstance(told, OSError) == hasattr(told, "errno") or index == 1, told
        assert str(told) == (str(error) if index == 1 else f"process 1: {error}"), told
assert distributed.take_from_first(lambda: f"of {index}") == "of 0"

latest = distributed.latest_of_all("wait", float(index))
assert latest[index] == index and (index == 0 or latest == {index: index}), latest
distributed.all_gather_str("")
if index == 0:
    assert distributed.latest_of_all("wait", 0.0) == {process: float(process) for process in range(count)}
distributed.all_gather_str("")
"""


def test_what_a_process_asks_of_the_coordination_service_does_not_grow_with_the_processes_and_a_failure_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = {}
    for count in (2, 3):
        commands = [[sys.executable, "-c", AGREE, str(index), str(count), str(port)] for index in range(count)]
        started = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        ended = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0] * count, ended
        calls[count] = {int(out.splitlines()[0]) for out, _ in ended}
        assert ended[0][0].splitlines()[1] == "{'0100007F'}"
    assert calls[2] == calls[3] == {20 * 4 - 1}
