"""Event files: each line of metrics.jsonl once, also after a resume and a full disk, read back with their checksums."""

import json
import shutil
import struct
import sys

import pytest

from charlstm.config import Config
from launch import train
from launch.support import cli
from launch.support.event_files import EventFiles
from tests.launch.conftest import refusal

pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")

FLAGS = ("--tensorboard", "--evaluate_every=20", "--sample_every=20", "--sample_length=8", "--keep_checkpoints=9")


def crc32c(data: bytes) -> int:
    """The masked CRC of a record, Castagnoli's polynomial, a bit at a time: no other program's word is taken for it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(run_dir) -> list:
    """The events of the one file, whose every record is whole."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (run_dir / "tensorboard").iterdir()
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        payload = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 8) == (crc32c(content[at : at + 8]),)
        assert struct.unpack_from("<I", content, at + 12 + length) == (crc32c(payload),)
        found.append(Event.FromString(payload))
        at += length + 16
    assert found[0].file_version == "brain.Event:2"
    return found


def points(run_dir) -> dict[str, list[tuple]]:
    """Tag -> the points (step, value) in the order of the file."""
    found: dict[str, list[tuple]] = {}
    for event in events(run_dir):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def expected(run_dir, split, name) -> list[tuple]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if line["split"] == split]


@pytest.fixture(scope="module")
def drawn(folder, arguments):
    run_dir = folder / "drawn"
    assert train.main(["train", *arguments, *FLAGS, f"--run_dir={run_dir}"]) == cli.DONE
    return run_dir


def test_event_files_have_the_lines_the_samples_and_the_settings_of_the_run(drawn):
    found = points(drawn)
    for split, name in (("train", "bits_per_byte"), ("train", "learning_rate"), ("valid", "bits_per_byte")):
        assert found[f"{split}/{name}"] == expected(drawn, split, name) != []
    (first, *_) = [event for event in events(drawn) if any(v.tag == "sample/text_summary" for v in event.summary.value)]
    sample = json.loads((drawn / "samples.jsonl").read_text().splitlines()[0])
    (text,) = first.summary.value[0].tensor.string_val
    assert first.step == sample["step"] == 20 and first.wall_time == pytest.approx(sample["time"])
    assert text.decode() == "\n".join(f"    {line}" for line in sample["text"].split("\n"))
    tags = [value for event in events(drawn) for value in event.summary.value]
    (settings,) = [value for value in tags if value.tag == "_hparams_/session_start_info"]
    assert b"hidden_size" in settings.metadata.plugin_data.content


@pytest.mark.long
def test_a_resumed_run_has_each_step_once(drawn, arguments, tmp_path):
    run_dir = shutil.copytree(drawn, tmp_path / "resumed")
    for step in ("30", "40"):
        shutil.rmtree(run_dir / "checkpoints" / step)
    assert train.main(["train", *arguments, *FLAGS, f"--run_dir={run_dir}"]) == cli.DONE
    found = points(run_dir)["train/bits_per_byte"]
    assert [step for step, _ in found] == [10, 20, 30, 40] and found == expected(run_dir, "train", "bits_per_byte")


def test_what_fails_is_said_once_and_never_stops_the_run(drawn, tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    files = EventFiles(tmp_path / "file" / "tensorboard", Config(), said.append)
    files.rebuild([{"step": 1, "split": "train", "bits_per_byte": 2.0}], [])
    files.record({"step": 2, "split": "train", "bits_per_byte": 2.0})
    files.close()
    assert len(said) == 1 and said[0].startswith("no event files for TensorBoard from here on: ")
    files = EventFiles(tmp_path / "tensorboard", Config(), said.append)
    files.rebuild([], [])
    with open("/dev/full", "wb", buffering=0) as full:
        files._writer._py_recordio_writer._writer = full
        for step in (1, 2):
            files.record({"step": step, "split": "train", "bits_per_byte": 2.0})
    assert len(said) == 2 and "No space left on device" in said[1]


def test_without_the_extra_it_says_what_to_install(arguments, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal(train.main, *arguments, "--tensorboard", f"--run_dir={tmp_path / 'run'}")
    assert said.endswith("pip install 'charlstm[tensorboard]'") and not (tmp_path / "run").exists()
