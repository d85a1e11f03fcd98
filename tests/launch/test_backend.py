"""--lstm_backend: what a run without a GPU does, and how the faster way is found."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm.config import Config
from charlstm.run import backend, estimate
from launch import evaluate, sample, train
from launch.support import cli
from tests.launch.conftest import refusal
from tests.launch.test_evaluate import make_run


def test_auto_is_the_loop_where_there_is_no_gpu_and_the_run_keeps_what_was_chosen(arguments, tmp_path):
    command = ["train", *arguments, f"--run_dir={tmp_path}", "--lstm_backend=auto"]
    for steps in (2, 4):  # begun, and continued by the same command
        assert train.main([*command, f"--num_steps={steps}"]) == 0
        assert json.loads((tmp_path / "config.json").read_text())["model"]["lstm_backend"] == "scan"
    log = (tmp_path / "log.txt").read_text()
    said = (
        "lstm_backend=scan on cpu: fused needs an NVIDIA GPU of the Hopper generation or newer, and JAX 0.11 or newer"
    )
    assert log.count(said) == 1
    assert [line.split(": ")[-1] for line in log.splitlines() if "changed since" in line] == ["2 -> 4"]


def test_what_needs_a_gpu_is_refused_where_there_is_none(arguments, tmp_path):
    needed = "an NVIDIA GPU of the Hopper generation or newer, and JAX 0.11 or newer"
    given = [*arguments, "--hidden_size=128", f"--run_dir={tmp_path / 'run'}", "--lstm_backend=fused"]
    assert refusal(train.main, *given) == (
        f"lstm_backend=fused needs {needed}, and there is cpu, JAX {jax.__version__}: give "
        "--lstm_backend=scan, whose sums round differently"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "capability"), [("AMD Instinct MI300X", "gfx942"), ("NVIDIA A10", "8.6")])
def test_auto_is_the_loop_on_a_gpu_that_the_kernels_are_not_for_and_they_are_refused_by_name(
    kind, capability, arguments, tmp_path, monkeypatch
):
    gpu = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    there = SimpleNamespace(devices=np.array([gpu]))
    for ask in (distributed.has_mosaic, distributed.device_kind):
        monkeypatch.setattr(distributed, ask.__name__, partial(lambda ask, mesh: ask(there), ask))
    monkeypatch.setattr(distributed, "MOSAIC_SINCE", (0, 0))  # so that any JAX looks at the device
    needed = "fused needs an NVIDIA GPU of the Hopper generation or newer, and JAX 0.11 or newer"
    begun, refused = tmp_path / "begun", tmp_path / "refused"
    assert train.main(["train", *arguments, f"--run_dir={begun}", "--num_steps=2", "--lstm_backend=auto"]) == cli.DONE
    assert json.loads((begun / "config.json").read_text())["model"]["lstm_backend"] == "scan"
    assert f"lstm_backend=scan on {kind}: {needed}\n" in (begun / "log.txt").read_text()
    by_name = ["--hidden_size=128", f"--run_dir={refused}", "--lstm_backend=fused"]
    assert refusal(train.main, *arguments, *by_name).startswith(f"lstm_backend={needed}, and there is {kind}, JAX ")
    assert not refused.exists()


@pytest.mark.parametrize(
    ("settings", "taken", "words"),
    [
        ({}, "fused", "lstm_backend=fused: an update took scan 30.0 ms, fused 5.0 ms on cpu"),
        ({"hidden_size": 100}, "scan", "lstm_backend=scan on cpu: fused does not know hidden_size=100"),
        ({"cell": "gru"}, "scan", "lstm_backend=scan on cpu: fused does not know cell=gru"),
        ({"lstm_backend": "scan"}, "scan", ""),
        ({"lstm_backend": "fused"}, "fused", ""),
    ],
    ids=["the fastest", "of what knows it", "one that the loop alone knows", *("as given",) * 2],
)
def test_of_what_is_left_open_the_fastest_way_is_taken(settings, taken, words, monkeypatch):
    seconds = {
        "scan": [0.9, 0.03, 0.02, 0.03, 0.03],
        "fused": [0.9, 0.005, 0.005, 0.02, 0.005],
    }
    monkeypatch.setattr(distributed, "has_mosaic", lambda mesh: True)
    monkeypatch.setattr(estimate, "time_steps", lambda config, *_, **__: seconds[config.model.lstm_backend])
    config = config_lib.replace(Config(), **({"lstm_backend": "auto"} | settings))
    chosen = backend.chosen(config, None, None, distributed.make())
    assert chosen == (config_lib.replace(config, lstm_backend=taken), words)


@pytest.mark.parametrize("how", [(), pytest.param(("--dynamic",), marks=pytest.mark.long)], ids=["static", "dynamic"])
def test_what_a_gpu_has_trained_is_scored_and_sampled_where_there_is_none(how, tmp_path, capsys):
    run_dir = make_run(tmp_path, {5: None}, "bytes", hidden_size=128)
    path = run_dir / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"lstm_backend": "scan"', '"lstm_backend": "fused"'))
    assert path.read_text() != before
    assert evaluate.main(["evaluate", f"--run_dir={run_dir}", "--split=valid", *how]) == cli.DONE
    assert "bits per byte" in capsys.readouterr().out
    assert sample.main(["sample", f"--run_dir={run_dir}", "--length=5", "--format=json"]) == cli.DONE
