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
import sys
from charlstm import distributed
from tests.conftest import ROOT

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
"""


def test_what_a_process_asks_the_coordination_service_does_not_grow_with_the_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = {}
    for count in (2, 5):
        commands = [[sys.executable, "-c", AGREE, str(index), str(count), str(port)] for index in range(count)]
        started = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        ended = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0] * count, ended
        calls[count] = {int(out) for out, _ in ended}
    assert calls[2] == calls[5] == {20 * 4 - 1}
