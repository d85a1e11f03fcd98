"""What does not fit in memory is refused before anything runs; where memory runs out all the same, a run ends soon."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import memory, start
from charlstm.run.memory import Limit
from charlstm.training import train_state
from launch import train
from launch.support import cli
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.launch.conftest import refusal

# A device fails for lack of memory, while the other one waits for it in a collective.
ONE_FAILS = """
import jax, jax.numpy as jnp, numpy as np, resource
from charlstm import distributed
from charlstm.run import memory
from launch.support import cli

def main(argv):
    mesh = distributed.make()
    by_device, count = distributed.BY_STREAM, 10 ** 8
    def local(x):
        many = jnp.cumsum(jnp.sin(jnp.arange(count, dtype=jnp.float32) * x)[::-1])[::-1]
        return jnp.sum(many[:5]) + jax.lax.psum(x, "data")
    x = distributed.put(mesh, by_device, np.ones(2, np.float32))
    compiled = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=by_device, out_specs=by_device, check_vma=False))
    temporary = compiled.lower(x).compile().memory_analysis().temp_size_in_bytes
    assert temporary >= 4 * count, temporary
    with memory.watched(mesh, cli.end_if_out_of_memory) as seen:
        mapped = memory._of_file("/proc/self/status", "VmSize:")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * temporary // 2,) * 2)
        result = compiled(x)
        seen(result)
        print(result.block_until_ready())
    return 0

cli.run("launch.train", main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited")
def test_a_device_that_has_no_memory_ends_the_process_in_one_line_while_the_other_waits():
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(ROOT)}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", ONE_FAILS], **how)
    assert done.returncode == cli.MISTAKE and done.stdout == "", done.stderr
    assert re.fullmatch(r"launch.train: out of memory \(.*\): lower batch_size, .*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--num_layers=1000000", r"num_layers=1000000 must be at most 256"),
        ("--mogrifier_rounds=1000000", r"mogrifier_rounds=1000000 must be at most 64"),
        ("--batch_size=1000000000", r"batch_size=1000000000 x 16 symbols of a window must be at most 2147483647"),
        ("--window=1000000000", r"batch_size=16 x 1000000000 symbols of a window must be at most 2147483647"),
        (
            "--hidden_size=1000000000",
            r"take [\d,.]+ TB, and there are [\d.]+ [GT]B of memory on this machine: lower hid",
        ),
        ("--embedding_size=2147483647", r"take [\d.]+ [GT]B, and there are [\d.]+ [GT]B of memory on this machine"),
        ("--hidden_size=1000000000 --dry_run", r"take [\d,.]+ TB, and there are 1,000.0 TB at most on any machine"),
    ],
)
def test_sizes_that_no_machine_has_are_refused_before_anything_is_traced(
    flags, sentence, arguments, tmp_path, monkeypatch, recwarn
):
    monkeypatch.setattr(jax, "eval_shape", None)
    said = refusal(train.main, *arguments, f"--run_dir={tmp_path / 'run'}", *flags.split())
    assert re.search(sentence, said), said
    assert not recwarn.list and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"optimizer": "sgd", "average": "ema"},
        {"cell": "gru", "embedding_size": 0},
        {"cell": "mlstm", "optimizer": "rmsprop"},
        {"cell": "rnn", "last_hidden_size": 64, "num_layers": 3},
        {"cell": "layer_norm_lstm", "optimizer": "adagrad", "embedding_size": 256, "tie_embeddings": True},
    ],
)
def test_the_state_is_known_about_before_it_is_traced(changes):
    config = config_lib.replace(Config(), **{"hidden_size": 256, "batch_size": 1, "embedding_size": 100} | changes)
    state = jax.eval_shape(lambda: train_state.init(config_lib.fill_automatic(config, 1), 96))
    there = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert 0.7 * there < memory.state_bytes(config, 96) <= there


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: Limit(10**8, "of memory on this machine"))


TOO_MUCH = (
    r"an update takes [\d.]+ [KM]B on 8 devices \([\d.]+ [KM]B each\), and there are 0 B left of memory on this "
    r"machine: lower one of batch_size=16, window=16, hidden_size=8, num_layers=1, or give --remat"
)


def test_an_update_that_does_not_fit_is_refused_before_the_run_is_made(arguments, small_machine, tmp_path):
    assert re.fullmatch(TOO_MUCH, refusal(train.main, *arguments, f"--run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_all_its_steps_is_loaded_and_nothing_is_compiled_for_it(arguments, copied, monkeypatch):
    monkeypatch.setattr(memory, "compiled_update", None)
    assert train.main(["train", *arguments, f"--run_dir={copied}"]) == cli.DONE
    assert "finished: the run is at step 40, and num_steps=40" in (copied / "log.txt").read_text()


def test_memory_is_asked_of_the_longest_window(arguments, tmp_path, monkeypatch):
    lengths = []

    class Step:
        def lower(self, _, batch):
            lengths.append(batch.inputs.shape[1])
            raise ValueError("is not compiled here")

    monkeypatch.setattr(start.step_lib, "make", lambda *_: Step())
    flags = (*arguments, "--window=64", "--window_deviation=16", f"--run_dir={tmp_path / 'run'}")
    assert refusal(train.main, *flags) == "is not compiled here"
    assert lengths == [96]


def test_a_dry_run_prints_all_sizes_of_what_does_not_fit(arguments, small_machine, capsys):
    assert train.main(["train", *arguments, "--dry_run"]) == cli.DONE
    table = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["time per step"] == "not timed: it does not fit" and "ETA" not in table
    assert re.fullmatch(TOO_MUCH, table["does not fit"])
    assert re.fullmatch(r"[\d.]+ [KM]B \(.*temporaries\)", table["memory per device"]) and table["parameters"]
    assert train.main(["train", *arguments, "--dry_run", "--dry_run_format=json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["seconds_per_step"] is None


def test_what_nearly_fills_the_memory_is_remarked_upon(monkeypatch):
    mesh, update = distributed.make(jax.devices()[:1]), memory.Update(10**9, 9 * 10**9, 1)
    monkeypatch.setattr(memory, "_available", lambda: 10_500_000_000)
    monkeypatch.setattr(memory, "limit", lambda: Limit(10**12, "of memory on this machine"))
    words = "memory may run out: an update takes 10.0 GB, and there are 10.5 GB available now"
    assert memory.close(update, mesh) == words and not memory.too_much(update, Config(), mesh)
    monkeypatch.setattr(memory, "_available", lambda: 20 * 10**9)
    assert memory.close(update, mesh) == ""


def test_the_limit_is_that_of_the_shell_or_of_the_control_group(tmp_path, monkeypatch):
    before, least = resource.getrlimit(resource.RLIMIT_AS), memory.limit()
    mapped = memory._of_file("/proc/self/status", "VmSize:")
    few = min(least.bytes, mapped + 10**9) - 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (few, before[1]))
        assert memory.limit() == Limit(few, "of address space (ulimit -v)")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            file = "memory/%s/memory.limit_in_bytes" if controllers else "%s/memory.max"
            path = tmp_path / (file % name.strip("/")).lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("1234567\n")
            monkeypatch.setattr(memory, "CGROUPS", str(tmp_path))
            assert memory.limit() == Limit(1234567, "of memory for this control group")
            path.write_text("max\n")
            assert memory.limit() == least


def test_the_update_is_compiled_once(arguments, tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING):
            assert (
                train.main(
                    ["train", *arguments, "--valid_fraction=0", f"--run_dir={tmp_path / 'run'}", "--num_steps=2"]
                )
                == cli.DONE
            )
    finally:
        jax.config.update("jax_log_compiles", False)
    assert caplog.text.count("Compiling jit(local_step)") == 1, caplog.text


def test_where_the_backend_does_not_tell_sizes_nothing_is_refused():
    class Step:
        def lower(self, *_):
            return self

        compile = lower

        def memory_analysis(self):
            return None

    config, mesh = config_lib.fill_automatic(Config(), 1), distributed.make(jax.devices()[:1])
    update = memory.compiled_update(Step(), config, 256, "uint8", mesh)
    assert update.on_a_device == 0 and memory.too_much(update, config, mesh) == ""
