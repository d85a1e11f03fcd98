"""Poison in a running job: a NaN in the text, the state, a parameter or a gradient, a spike, a bit on one device.

The job is a real one of two processes.  What is done to it is done to the arguments of its training step, as bad memory
or a bad text would: at a step or a window, so that a job which is killed meets it again.
"""

import os
import re
import signal

import pytest

from charlstm.run.step_directory import StepDirectory
from launch.support import cli
from tests.faults.by_hand import whole_steps
from tests.faults.conftest import Seen
from tests.jobs import ROOT, children, has_saved, job, last_line, wait_for

POISONING = """
import jax
import numpy as np
from charlstm.training import step

make, done = step.make, []

def at(array, *index):
    return lambda value: jax.jit(lambda a: a.at[index].set(value), out_shardings=array.sharding)(array)

def no_symbol(ids):
    return jax.jit(lambda a: a.astype(np.int32).at[3, 2].set(999), out_shardings=ids.sharding)(ids)

def flipped(array):
    copies = [np.array(shard.data) for shard in array.addressable_shards]
    if jax.process_index() == 1:
        copies[0].view(np.uint32)[3] ^= 1 << 20
    devices = [shard.device for shard in array.addressable_shards]
    parts = [jax.device_put(copy, device) for copy, device in zip(copies, devices)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

def poisoned_make(config, vocabulary_size, mesh, steps_per_epoch):
    train_step = make(config, vocabulary_size, mesh, steps_per_epoch)

    def poisoned_step(state, batch):
        step, window = int(state.step), int(state.divergence.next_window)
        params, (first, *others) = state.params, state.recurrent_state
        {poison}
        return train_step(state, batch)

    poisoned_step.lower = train_step.lower
    return poisoned_step

step.make = poisoned_make
"""
TEXT = "if window == 110: batch = batch._replace(targets=no_symbol(batch.targets))"
ALL_TEXT = "if window >= 110: batch = batch._replace(targets=no_symbol(batch.targets))"
ROW = "if step == 110: state = state._replace(recurrent_state=(first._replace(c=at(first.c, 13)(np.nan)), *others))"
GRADIENT = """if step == 110:
            params = params._replace(w_out=at(params.w_out, 0)(1e30))
            state = state._replace(params=params)"""
PARAMETER = """if step == 110 and not done:
            done.append(step)
            state = state._replace(params=params._replace(b_out=at(params.b_out, 2)(np.nan)))"""
SPIKE = """if step == 110 and not done:
            done.append(step)
            state = state._replace(params=params._replace(b_out=at(params.b_out, 2)(60.0)))"""
BIT = """if step == 115 and not done:
            done.append(step)
            state = state._replace(params=params._replace(b_out=flipped(params.b_out)))"""


@pytest.fixture
def poisoned_job(job_flags, tmp_path):
    """Runs the job of two processes to its end: (its run directory, its exit status, what it said)."""

    def run(name, poison, *flags, kill_at=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(POISONING.replace("{poison}", poison))
        own = ("--processes=2", "--devices_per_process=1", "--restarts=2", "--grace=20")
        where = f"--run_dir={folder / 'run'}"
        with job(own, *job_flags, "--checkpoint_every=40", *flags, where, python_path=f"{folder}:{ROOT}") as running:
            if kill_at:
                wait_for(has_saved(folder / "run", kill_at))
                os.kill(children(running.pid)[1], signal.SIGKILL)
            _, said = running.communicate(timeout=600)
        assert "Traceback" not in said, said
        return folder / "run", running.returncode, said

    return run


def arrays(run_dir) -> dict[str, dict]:
    """What the newest checkpoint says of its arrays, but for the counters of divergence."""
    files = StepDirectory(run_dir / "checkpoints")
    held = files.read(files.steps()[-1])["arrays"]
    return {name: array for name, array in held.items() if not name.startswith("divergence.")}


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (TEXT, "loss=nan is not finite at step 111, in stream 3"),
        (ROW, "loss=nan is not finite at step 111, in stream 13"),
        (GRADIENT, "gradient norm=(inf|nan) is not finite at step 111, in"),
        (PARAMETER, "loss=nan is not finite at step 111, in"),
        (SPIKE, "loss=.* bits is a spike at step 111, where .* is usual"),
    ],
    ids=["text", "row of state", "gradient", "parameter", "spike"],
)
def test_by_default_the_job_stops_says_where_and_has_saved_nothing_of_it(poison, words, poisoned_job, request, table):
    spike = ("--spike_factor=1.5",) if poison == SPIKE else ()
    run_dir, status, said = poisoned_job("run", poison, *spike)
    assert status == cli.DIVERGED, said
    assert re.search(rf"^\[0\] stopped: {words}.*; nothing of it was saved$", said, re.M), said
    assert StepDirectory(run_dir / "checkpoints").steps() == [40, 80]
    table.append(Seen(f"poisoned {request.node.callspec.id}, stop", 1, "-", "stopped by all, nothing of it saved"))


@pytest.mark.parametrize(("poison", "rows"), [(TEXT, 1), (ROW, 1)], ids=["text", "row"])
def test_skipping_costs_one_update_and_the_poisoned_rows(poison, rows, poisoned_job, table):
    run_dir, status, said = poisoned_job("run", poison, "--on_divergence=skip")
    assert status == cli.DONE, said
    assert re.search(
        rf"at step 111, in stream \d+: update skipped, {rows} row of the recurrent state zeroed$", said, re.M
    )
    killed, status, said = poisoned_job("killed", poison, "--on_divergence=skip", kill_at=120)
    assert status == cli.DONE and "starting again from step " in said, said
    equal = last_line(run_dir)["state_digest"] == last_line(killed)["state_digest"]
    name = "poisoned text" if poison == TEXT else "poisoned row of state"
    table.append(Seen(f"{name}, skip; the same, killed later", 2, "1 skipped", str(equal)))
    assert equal


def test_what_skipping_does_not_help_against_is_not_skipped_for_ever(poisoned_job, table):
    _, status, said = poisoned_job("nan", PARAMETER, "--on_divergence=skip")
    assert status == cli.DIVERGED and "update skipped" not in said, said
    _, status, said = poisoned_job("text", ALL_TEXT, "--on_divergence=skip", "--max_skips=4")
    assert status == cli.DIVERGED and "after 4 updates skipped one after the other (max_skips)" in said, said
    assert said.count("update skipped") == 4
    table.append(Seen("poisoned parameter, or all text poisoned, skip", 2, "-", "stopped by all"))


def test_going_back_leaves_the_windows_out_and_is_the_same_when_the_job_is_killed(poisoned_job, table):
    run_dir, status, said = poisoned_job("run", TEXT, "--on_divergence=rollback")
    assert status == cli.DONE, said
    assert "went back to step 80, rollback 1 of 3; windows 80 to 110 of each stream are left out" in said
    steps = [int(step) for step in re.findall(r"^\[0\] step (\d+)/", said, re.M)]
    assert steps == sorted(set(steps)) and last_line(run_dir)["step"] == 240
    killed, status, said = poisoned_job("killed", TEXT, "--on_divergence=rollback", kill_at=120)
    assert status == cli.DONE and "starting again from step " in said, said
    equal = last_line(run_dir)["state_digest"] == last_line(killed)["state_digest"]
    table.append(Seen("poisoned text, rollback; the same, killed later", 2, "31", str(equal)))
    assert equal


@pytest.mark.parametrize(("poison", "flags"), [(PARAMETER, ()), (SPIKE, ("--spike_factor=1.5",))], ids=["nan", "spike"])
def test_going_back_heals_what_skipping_does_not(poison, flags, poisoned_job, table):
    run_dir, status, said = poisoned_job("run", poison, "--on_divergence=rollback", *flags)
    assert status == cli.DONE and said.count("went back to step 80") == 1, said
    assert last_line(run_dir)["step"] == 240
    table.append(Seen(f"poisoned parameter ({'a spike' if flags else 'nan'}), rollback", 1, "31", "-"))


def test_a_run_goes_back_only_so_often(poisoned_job, table):
    _, status, said = poisoned_job("run", ALL_TEXT, "--on_divergence=rollback", "--max_rollbacks=2")
    assert status == cli.DIVERGED and said.count("went back to step 80") == 2, said
    assert "stopped: the run has gone back 2 times (max_rollbacks)" in said
    table.append(Seen("all text poisoned, rollback", 1, "-", "stopped by all after 2"))


def test_a_bit_that_flips_on_one_device_is_found_and_costs_no_bit(poisoned_job, undisturbed, job_flags, table):
    _, status, said = poisoned_job("stop", BIT, "--check_replicas_every=10")
    assert status == cli.DIVERGED, said
    named = r"the copies on device 0 \(cpu:0 of process 0\), device 1 \(cpu:\d+ of process 1\) differ, in .*b_out"
    assert re.search(f"stopped: {named}", said), said
    run_dir, status, said = poisoned_job("run", BIT, "--check_replicas_every=10", "--on_divergence=rollback")
    assert status == cli.DONE and "went back to step 80, rollback 1 of 3\n" in said, said
    straight, status, _ = poisoned_job("straight", "pass")
    assert last_line(straight)["state_digest"] == undisturbed["state_digest"]
    equal = arrays(run_dir) == arrays(straight)
    table.append(Seen("a bit of a parameter flipped on one device, rollback", 1, "40", str(equal)))
    assert equal


def test_a_bit_that_flips_on_one_device_is_found_by_the_next_save_and_no_checkpoint_is_lost(poisoned_job, table):
    run_dir, status, said = poisoned_job("stop", BIT, "--keep_checkpoints=1")
    assert status == cli.DIVERGED, said
    named = r"the copies on device 0 \(cpu:0 of process 0\), device 1 \(cpu:\d+ of process 1\) differ, in .*b_out"
    assert re.search(rf"stopped: {named}.* after step 120; nothing of it was saved", said), said
    assert whole_steps(run_dir) == [80]
    healed, status, said = poisoned_job("healed", BIT, "--on_divergence=rollback")
    assert status == cli.DONE and "went back to step 80, rollback 1 of 3\n" in said, said
    straight, _, _ = poisoned_job("straight", "pass")
    equal = arrays(healed) == arrays(straight)
    table.append(Seen("a bit flipped on one device, found by the next save; the same, rollback", 2, "40", str(equal)))
    assert equal
