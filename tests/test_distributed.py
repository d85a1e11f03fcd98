"""How the loss of another process is told from what has gone wrong in this one."""

import errno
import os

import jax
import pytest

from charlstm import distributed

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
