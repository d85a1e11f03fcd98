"""The quick form of every benchmark gives its rows."""

import hashlib
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, equal_time, gpu, gpu_twins, restore
from benchmarks import rows as rows_lib
from benchmarks.rows import Rows
from charlstm.model.cells import lstm
from charlstm.model.ops import matmul
from data_pipeline.build import datasets, downloads
from tests import compiling
from tests.conftest import ROOT


def quick(benchmark: str, *arguments: str) -> list[dict]:
    """The rows of `python -m benchmarks.BENCHMARK --quick ARGUMENTS`, which ends with a table of them."""
    # Not with the suite's strict promotion, which is for our own modules.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUMPY_")}
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert all(row["benchmark"] == benchmark for row in rows)
    assert sum(line.startswith("| ") for line in lines) > len(rows)
    return rows


@pytest.fixture
def peers() -> None:
    for library in ("torch", "flax", "haiku", "optax"):
        pytest.importorskip(library, reason="the peers are not installed: make bench has its own environment")


def test_a_train_step_is_timed_beside_its_peers(peers):
    rows = quick("train_step")
    assert [row["contestant"] for row in rows] == ["ours", "PyTorch", "flax", "haiku", "textbook twin"]
    for row in rows:
        assert row["characters_per_second"] > 0 and row["megabytes"] > 1
        assert 0 < row["of_matrix_rate"] < 2
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ours_is_faster_by"] <= high
    assert rows[0]["ours_is_faster_by"] == 1


def test_sampling_is_timed_beside_pytorch_and_the_reading_of_the_weights(peers):
    rows = quick("sampling")
    assert [(row["samples"], row["contestant"]) for row in rows] == [
        (samples, name) for samples in (1, 64) for name in ("ours", "PyTorch", "the weights read")
    ]
    assert all(row["characters_per_second"] > 0 for row in rows)


def test_launch_train_is_timed_beside_a_script(peers):
    rows = quick("end_to_end")
    speed, start, stall = (
        [row for row in rows if key in row] for key in ("input_wait", "seconds_to_first_step", "stall_seconds")
    )
    assert [row["contestant"] for row in speed] == ["ours", "PyTorch"]
    assert 0 <= speed[0]["input_wait"] < 1 and speed[1]["input_wait"] is None
    assert [row["contestant"] for row in start] == ["ours, cache empty", "ours, cache warm", "PyTorch"]
    assert all(row["seconds_to_first_step"] > 0.1 for row in start)
    assert [row["contestant"] for row in stall] == ["ours", "PyTorch"] and all(r["seconds_held_up"] >= 0 for r in stall)


def test_models_are_compared_after_equal_seconds(peers):
    found = quick("equal_time")
    assert [row["contestant"].split()[-1] for row in found] == ["configs/small.flags", "nn.LSTM", "transformer"]
    assert all(2 < row["bits_per_byte"] < 8.5 and row["best"] <= row["bits_per_byte"] for row in found)
    seconds = [row["seconds"] for row in found]
    assert all(seconds[0] <= other < seconds[0] + 30 for other in seconds[1:])


def test_a_flagfile_is_compared_on_a_text_of_its_own_and_scored_whole_at_the_end(peers, tmp_path):
    lines = [f"{n} bottles of beer on the wall, {n * n} in the cellar\n" for n in range(9000)]
    for name, part in (("train", lines[::2]), ("valid", lines[1::2])):
        with lzma.open(tmp_path / f"{name}.xz", "wt") as file:
            file.write("".join(part) * (1 if name == "train" else 2))
    found = quick(
        "equal_time",
        f"--text={tmp_path}/train.xz:{tmp_path}/valid.xz",
        "--flagfile=configs/twenty_minutes.flags",
        "--also=--cell=lstm,--segment=0,--nocap_input_gate",
        "--peers=lstm",
        f"--folder={tmp_path}/kept",
    )
    assert [row["contestant"].rpartition(",")[2].split()[-1] for row in found] == [
        "configs/twenty_minutes.flags",
        "nn.LSTM",
        "--nocap_input_gate",
    ]
    assert all(row["final"] != row["bits_per_byte"] and abs(row["final"] - row["bits_per_byte"]) < 0.2 for row in found)
    normalized, theirs, plain = (row["parameters"] for row in found)
    assert normalized > theirs == plain
    curves = json.loads((tmp_path / "kept" / "curves.json").read_text())
    assert [seconds == sorted(seconds) for seconds, _ in curves.values()] == [True] * 3


def test_each_side_of_a_comparison_runs_alone(peers):
    assert [row["contestant"] for row in quick("equal_time", "--only=ours")] == ["charlstm, configs/small.flags"]
    (alone,) = quick("equal_time", "--only=lstm")
    assert alone["contestant"] == "PyTorch nn.LSTM" and alone["seconds"] > 5


def test_a_text_that_is_downloaded_may_be_named_in_equal_time(monkeypatch, tmp_path):
    text = b"a text that was put there by hand"
    there = downloads.Download(
        "by_hand.txt", "https://none.invalid/by_hand.txt", len(text), len(text), "md5", hashlib.md5(text).hexdigest()
    )
    monkeypatch.setitem(datasets.DOWNLOADS, "by_hand", there)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".cache" / "charlstm" / "downloads" / "by_hand.txt"
    place.parent.mkdir(parents=True)
    place.write_bytes(text)
    assert equal_time.content("by_hand") == text
    assert b"".join(equal_time.read("by_hand", False)) == text


def test_ours_has_a_logical_shard_a_device_in_equal_time(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def stop(command, **_):
        flags = [word for word in command if word.startswith("--")]
        raise Stop(flags.index("--logical_shards=0") - flags.index("--flagfile=configs/large.flags"))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(equal_time.subprocess, "run", stop)
    with pytest.raises(Stop) as stopped:
        equal_time.ours(equal_time.write_parts(b"text", b"more", tmp_path), "configs/large.flags", 60, 0, [])
    assert stopped.value.args[0] > 0, "the later of two wins"


def test_a_loss_that_is_scaled_for_float16_makes_the_update_that_it_makes_unscaled():
    torch = pytest.importorskip("torch", reason="the peers are not installed: make bench has its own environment")
    from benchmarks.peers import equal_time as scripts

    def after(scaled: bool):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=scaled)
        for scale in (0.01, 100.0):  # clipped or not
            scripts.update(model, optimizer, scaler, scale * model(torch.ones(1, 3)).square().sum())
        return [p.detach().numpy() for p in model.parameters()]

    for a, b in zip(after(True), after(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"only": "lstm"}, "say how long, as --minutes=10"),
        ({"only": "gru"}, "use ours, lstm or"),
        ({"peers": "lstm,gru"}, "there is no gru: use some of lstm, transformer"),
    ],
)
def test_a_side_that_cannot_run_is_refused_before_anything_is_trained(given, sentence):
    settings = dict.fromkeys(("text", "flagfile", "also", "peers", "only", "plot", "folder"), "") | given
    with pytest.raises(SystemExit, match=sentence):
        equal_time.run(Rows("equal_time"), quick=False, minutes=0.0, seed=0, **settings)


def test_the_pipeline_is_timed_beside_training_and_corpora_are_opened(peers):
    feed, *opened = quick("input")
    assert feed["windows_per_second"] > 0 and feed["faster_than_eaten_by"] > 0
    assert [(row["corpus"], row["at"]) for row in opened] == [
        (corpus, at) for at in ("start", "resume") for corpus in ("1 MB", "1 GB")
    ]
    for row in opened:
        assert 0 < row["seconds"] < 60 and row["megabytes_on_disk"] < 2
        assert abs(row["megabytes_beyond_1_MB"]) < 50


def test_devices_and_processes_are_timed(peers):
    rows = quick("scaling")
    devices, processes = [row for row in rows if "devices" in row], [row for row in rows if "processes" in row]
    assert [(row["devices"], row["reduction"]) for row in devices] == [
        (n, how) for n in (1, 2) for how in ("exact", "fast")
    ]
    assert [row["collectives"] for row in devices] == [
        {},
        {"all-reduce": 1},
        {"all-to-all": 1, "all-gather": 1},
        {"all-reduce": 1},
    ]
    assert all(row["milliseconds"] > 0 and row["serial_milliseconds"] > 0 for row in devices)
    assert [row["processes"] for row in processes] == [1, 2]


def test_agreements_of_processes_are_counted_and_timed():
    *rows, of_all, of_latest = sorted(quick("agreement"), key=lambda row: "processes" not in row)
    assert [(row["function"], row["processes"], row["calls"]) for row in rows] == [
        ("all_gather_str", 2, 4),
        ("all_gather_str", 3, 4),
        ("latest_of_all", 2, 1),
        ("latest_of_all", 3, 1),
    ]
    assert all(row[key] > 0 for row in rows for key in ("milliseconds", "processor_milliseconds", "of_another_process"))
    for function, line in (("all_gather_str", of_all), ("latest_of_all", of_latest)):
        at = {row["processes"]: row["processor_milliseconds"] for row in rows if row["function"] == function}
        assert line["function"] == function
        assert line["processor_milliseconds_of_1024"] == pytest.approx(at[2] + 1022 * (at[3] - at[2]))


def test_a_line_through_less_than_two_counts_of_processes_is_refused_before_they_start():
    with pytest.raises(SystemExit, match="--most=3: a line needs two counts of processes: use 4 or more"):
        agreement.run(Rows("agreement"), quick=False, most=3, agreements=1, rounds=1)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what a process reads")
def test_what_processes_read_of_a_checkpoint_is_counted_and_timed():
    rows = quick("restore")
    assert [(row["processes"], row["arrays"]) for row in rows] == [(1, "dealt"), (2, "dealt"), (2, "whole")]
    alone, dealt, whole = (row["megabytes_of_all"] for row in rows)
    assert alone < dealt < whole
    assert all(row["seconds"] > 0 for row in rows)


def test_no_process_at_all_is_refused_before_a_checkpoint_is_written():
    with pytest.raises(SystemExit, match="--most=0: there is no number of processes below 1"):
        restore.run(Rows("restore"), quick=False, most=0, rounds=1)


def test_every_reader_is_timed_beside_its_bare_decoder():
    pytest.importorskip("pyarrow", reason="pyarrow is absent: pip install charlstm[inputs]")
    rows = quick("readers")
    assert [row["kind"] for row in rows] == ["jsonl", "csv", "parquet", "arrow", "xml", ".gz", ".bz2", ".xz", ".zst"]
    assert all(row["megabytes_per_second_of_a_core"] > 0 and row["of_bare"] > 0.05 for row in rows)


@pytest.fixture
def quick_gpu(monkeypatch, tmp_path):
    """The rows of some parts of benchmarks.gpu; here with the devices that a user finds, not eight."""
    monkeypatch.setenv("XLA_FLAGS", compiling.xla_flags())

    def run(*parts):
        rows = quick("gpu", f"--parts={','.join(parts)}", f"--file={tmp_path}/rows.jsonl")
        written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert [{k: v for k, v in row.items() if k not in ("benchmark", "load")} for row in rows] == written
        machine, *others = written
        assert machine["platform"] == "cpu" and machine["backends"] == "scan"
        assert sorted(row["part"] for row in others if "seconds" in row and len(row) == 2) == sorted(parts)
        return [row for row in others if len(row) > 2]

    return run


@pytest.mark.long
def test_what_only_a_gpu_can_show_is_tried_on_a_cpu(quick_gpu):
    of = {part: [] for part in gpu.BESIDE}
    for row in quick_gpu(*gpu.BESIDE):
        of[row.pop("part")].append(row)
    assert "passed" in of["tests"][0]["said"]
    cases = len(gpu_twins.PRECISIONS) * len(gpu_twins.CASES) * len(gpu_twins.FORGET_BIASES)
    assert len(of["twins"]) == cases and all(row["ok"] and row["gradient_error"] > 0 for row in of["twins"])
    assert [row["again"] and row["killed_and_resumed"] and row["ok"] for row in of["bits"]] == [True]
    assert [(row["trained_on"], row["difference"] < 1e-6) for row in of["crossing"]] == [
        ("the device", True),
        ("the CPU", True),
    ]


@pytest.mark.long
def test_what_a_gpu_is_timed_at_is_tried_on_a_cpu(peers, quick_gpu):
    found = [(row["part"], row["contestant"], row.get("samples")) for row in quick_gpu(*gpu.ALONE)]
    assert found == [
        *(("large", name, None) for name in ("ours", "PyTorch", "ours with fixed kernels")),
        *(("update", name, None) for name in ("ours", "PyTorch", "flax", "ours with fixed kernels")),
        *(("program", name, None) for name in ("ours", "PyTorch")),
        *(("sampling", name, n) for n in (1, 64) for name in ("ours", "PyTorch", "the weights read")),
    ]


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Runs benchmarks.gpu with other parts, on a machine that is said to have a GPU."""

    def run(beside, alone):
        monkeypatch.setattr(gpu, "machine_for", lambda quick: {"platform": "gpu", "backends": "scan, fused"})
        monkeypatch.setattr(gpu, "BESIDE", beside)
        monkeypatch.setattr(gpu, "ALONE", alone)
        monkeypatch.setattr(sys, "argv", ["gpu"])
        rows_lib.main("gpu", gpu.run, parts=",".join([*beside, *alone]), file=str(tmp_path / "rows.jsonl"))

    return run


def test_the_status_of_the_gpus_suite_is_1_where_a_row_is_not_ok_and_the_last_line_names_it(parts, capsys):
    def twins(programs, add):
        add(backend="fused", forget_bias=7, error=0.5, ok=False)
        add(backend="scan", forget_bias=7, error=0.1, ok=True)

    def update(programs, add):
        raise RuntimeError("no memory\nis left")

    with pytest.raises(SystemExit) as ended:
        parts({"twins": twins}, {"update": update})
    lines = capsys.readouterr().out.splitlines()
    assert (ended.value.code, lines[-1]) == (1, "not ok: twins backend=fused forget_bias=7; update has failed")
    assert any('"failed": "no memory is left"' in line for line in lines)
    parts({"twins": lambda programs, add: add(backend="scan", ok=True)}, {})  # ends well


def test_the_parts_of_the_gpus_suite_have_eight_minutes_together(parts, monkeypatch):
    alone, every = sum(gpu.SECONDS[part] for part in gpu.ALONE), [*gpu.BESIDE, *gpu.ALONE]
    assert max(gpu.SECONDS[part] for part in gpu.BESIDE) + alone < gpu.MOST == 8 * 60
    later = alone - gpu.SECONDS["large"]
    assert gpu.deadline("large", every, 1000, 1480, 1) == 1480 - later  # what is left over, but for the later parts'
    assert gpu.deadline("large", every, 1200, 1480, 1) == 1200 + gpu.SECONDS["large"]
    now, deadlines = [1000.0], []

    def takes(seconds):
        def part(programs, add):
            deadlines.append(programs.deadline)
            now[0] += seconds

        return part

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    parts({"tests": takes(400)}, {"update": takes(50), "sampling": takes(0)})
    assert deadlines == [1480 - gpu.SECONDS["update"] - gpu.SECONDS["sampling"], 1480, 1480]


def python(statements: str) -> tuple[str, ...]:
    """What `Programs` runs of these statements."""
    return ("timeit", "-n1", "-r1", statements)


def test_a_program_of_the_gpus_suite_that_takes_too_long_is_ended_and_what_it_said_kept(tmp_path):
    for run in ("run", "lines"):
        programs = gpu.Programs(tmp_path, time.monotonic() + 2, True, {})
        with pytest.raises(RuntimeError, match=r"took (longer than its part may|too long): (.|\n)*half way"):
            command = python("import sys, time; print('half way', file=sys.stderr, flush=True); time.sleep(60)")
            list(getattr(programs, run)(*command))


def test_a_program_of_the_gpus_suite_is_ended_where_its_reader_has_failed(tmp_path):
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    lines = gpu.Programs(tmp_path, time.monotonic() + 600, True, {}).lines("timeit", "-n1", "-r1", script)
    number = int(next(lines))
    lines.close()
    with pytest.raises(ChildProcessError):  # ended, and waited for
        os.waitpid(number, os.WNOHANG)


def test_why_a_program_of_the_gpus_suite_failed_is_kept_before_a_long_traceback(tmp_path):
    for run in ("run", "lines"):
        programs = gpu.Programs(tmp_path, time.monotonic() + 60, True, {})
        with pytest.raises(RuntimeError, match="no module of a peer"):
            list(getattr(programs, run)(*python("raise ValueError('no module of a peer' + 2000 * '.')")))


def test_a_program_of_the_gpus_suite_may_say_much_before_it_is_killed(tmp_path):
    programs, there = gpu.Programs(tmp_path, time.monotonic() + 20, True, {}), tmp_path / "there"
    say = f"import pathlib, sys, time; sys.stderr.write(10**6 * '.'); pathlib.Path({str(there)!r}).touch()"
    programs.run(*python(f"{say}; time.sleep(99)"), until=there)
    assert there.exists()


def test_of_the_suite_a_gpu_is_given_the_files_that_have_tests_for_it_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    given, said = [], []
    programs = SimpleNamespace(quick=False, run=lambda *command, **_: given.extend(command) or "3 passed")
    gpu.tests(programs, lambda **row: said.append(row))
    files = [word for word in given if word.endswith(".py")]
    assert {"tests/run/test_digest.py", "tests/model/ops/test_lstm_pallas.py"} < set(files)
    assert all("mark.gpu" in (ROOT / file).read_text() for file in files) and "tests" not in given
    assert said == [{"said": "3 passed"}]


def test_runs_whose_kernels_were_timed_may_differ_and_those_of_fixed_kernels_may_not(tmp_path):
    found = []
    trained = itertools.count()
    programs = SimpleNamespace(
        folder=tmp_path,
        machine={"platform": "gpu", "backends": "scan, fused"},
        train=lambda *_, **__: {"state_digest": next(trained)},
    )
    gpu.bits(programs, lambda **row: found.append(row))
    assert len(found) == len(gpu.RUNS) and not any(row["again"] or row["killed_and_resumed"] for row in found)
    assert all(row["ok"] != row["fixed"] for row in found)


def test_a_window_is_compiled_once_for_all_forget_biases(monkeypatch, tmp_path, capsys):
    traced, recurrence = [], gpu_twins.backends()["scan"]
    for name, value in {"T": 3, "B": 2, "H": 8, "CASES": [("plain", True)]}.items():
        monkeypatch.setattr(gpu_twins, name, value)
    monkeypatch.setattr(gpu_twins, "PRECISIONS", {"float32": gpu_twins.PRECISIONS["float32"]})
    monkeypatch.setattr(gpu_twins, "backends", lambda: {"scan": lambda *a: traced.append(a) or recurrence(*a)})
    with jax.enable_x64(True):
        gpu_twins.reference(str(tmp_path / "reference.npz"))
    gpu_twins.compare(str(tmp_path / "reference.npz"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["forget_bias"] for row in rows] == list(gpu_twins.FORGET_BIASES)
    assert all(row["ok"] and row["gradient_error"] > 0 for row in rows) and len(traced) == 1


def test_float32_has_room_for_the_last_digits_of_a_gpus_tanh_and_none_for_tf32(monkeypatch, tmp_path, capsys):
    """A GPU's tanh is a quotient, and its quotients are 2 ulp off (PTX's div.full.f32)."""
    for name, value in {"T": 8, "B": 4, "H": 64, "CASES": [("plain", False)]}.items():
        monkeypatch.setattr(gpu_twins, name, value)
    monkeypatch.setattr(gpu_twins, "PRECISIONS", {"float32": gpu_twins.PRECISIONS["float32"]})
    path = str(tmp_path / "reference.npz")
    with jax.enable_x64(True):
        gpu_twins.reference(path)

    def ok_with(tanh, dot=jnp.dot) -> list[bool]:
        for module, changes in ((lstm, {"tanh": tanh}), (matmul, {"dot": dot})):
            monkeypatch.setattr(module, "jnp", SimpleNamespace(**{**vars(jnp), **changes}))
        gpu_twins.compare(path)
        return [json.loads(line)["ok"] for line in capsys.readouterr().out.splitlines()]

    def tf32(a):
        return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=10)

    assert all(ok_with(lambda x: jnp.tanh(x) * np.float32(1 - 2**-23)))  # 2 ulp next to 1
    assert not any(ok_with(jnp.tanh, lambda a, b, **k: jnp.dot(tf32(a), tf32(b), **k)))


def test_flax_is_timed_where_there_is_no_haiku():
    for library in ("flax", "optax"):
        pytest.importorskip(library, reason="the peers are not installed: make bench has its own environment")
    hidden = "import sys; sys.modules['haiku'] = None; from benchmarks.peers.autodiff import flax"
    subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, check=True)


@pytest.mark.parametrize("there", [True, False])
def test_the_gpus_suite_is_refused_in_a_line_where_jax_has_no_gpu(there, monkeypatch):
    found = {"platform": "cpu", "device": "4 x cpu in 1 process", "jax": "0.12.0"}
    monkeypatch.setattr(gpu.Programs, "run", lambda *_: json.dumps(found))
    monkeypatch.setattr(gpu, "has_gpu", lambda: there)
    with pytest.raises(SystemExit) as refused:
        gpu.run(Rows("gpu"), quick=False, parts="twins", file=os.devnull)
    said = str(refused.value.code)
    assert ("there is a GPU, and JAX 0.12.0" in said and "4 x cpu" in said) == there
    assert "--quick tries it on a CPU" in said and "\n" not in said
    assert gpu.machine_for(quick=True) == found


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_gpu_takes_a_jax_for_the_gpu_that_is_there_or_the_one_that_is_named():
    apart = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test's own

    def commands(*given):
        command = ["make", "-n", "-B", "gpu", *given]  # also where the environment is there
        return subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=True).stdout

    assert "'.[bench,cuda13]'" in commands("GPUS=/dev/nvidia0")
    assert "'.[bench]'" in commands("GPUS=")
    assert "'.[bench,cuda12]'" in commands("GPUS=/dev/nvidia0", "BENCH_EXTRAS=bench,cuda12")
    assert commands("GPU_PYTHON=/opt/python").strip() == "/opt/python -m benchmarks.gpu"


@pytest.mark.long
def test_preparing_by_parts_is_timed_beside_at_once_and_a_store_beside_a_disk():
    pytest.importorskip("pyarrow", reason="pyarrow is absent: pip install charlstm[inputs]")
    assert [(row["kind"], row["prepared"]) for row in quick("parts")] == [
        (kind, way) for kind in ("txt", "jsonl.zst", "characters") for way in ("at once", "by parts")
    ]
    pytest.importorskip("obstore", reason="obstore is absent: pip install charlstm[remote]")
    rows = quick("remote")
    assert {row["place"] for row in rows if "place" in row} >= {"disk"}
    assert [row["corpus"] for row in rows if row.get("at") == "resume"] == ["1 MB", "1 GB"]
    assert all(0 <= row["input_wait"] < 1 for row in rows if "input_wait" in row)
