"""`python -m launch.prepare` by parts: its flags, and the recipes for Slurm and Kubernetes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.manifest import read_manifest
from launch import prepare
from launch.support import cli, flags
from tests.conftest import ROOT
from tests.launch.conftest import refusal

yaml = pytest.importorskip("yaml", reason="PyYAML is absent: pip install charlstm[cluster]")


@pytest.fixture
def options(tmp_path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text("".join(f"line {n * n} of a text, é\n" for n in range(300)))
    return (f"--input={tmp_path / 'text.txt'}", f"--cache_dir={tmp_path / 'cache'}", "--part_bytes=2048")


def test_workers_and_the_join_say_how_far_they_are(options, tmp_path, capsys):
    out = tmp_path / "out"

    def run(*more: str) -> str:
        assert prepare.main(["prepare", *options, f"--output={out}", *more]) == cli.DONE
        return capsys.readouterr().err

    assert "4 parts, worker 1 of 2\nprepared 2 of 4 parts; 2 are still missing\n" in run("--part=1/2")
    said = refusal(prepare.main, *options, f"--output={out}", "--join")
    assert "2 of 4 parts are missing (0, 2): start their workers again" in said
    assert f"prepared: {out}, 256 symbols in the vocabulary, train " in run("--part=0/2")
    assert f"prepared: {out}, " in run("--join")
    assert prepare.main(["prepare", *options, f"--output={tmp_path / 'local'}", "--engine=local"]) == cli.DONE
    assert read_manifest(out) == read_manifest(tmp_path / "local")


def test_ways_that_exclude_each_other_are_refused(options, tmp_path):
    def refused(*more: str) -> str:
        return refusal(prepare.main, *options, f"--output={tmp_path / 'out'}", *more)

    assert "different ways to prepare by parts: give one of them" in refused("--part=0/2", "--engine=local")
    assert "--part_bytes is of a preparation by parts" in refused()
    assert "part='2/2' is not i/n with i from 0 to n - 1" in refused("--part=2/2")
    assert "engine='spark' is neither local nor dask:ADDRESS" in refused("--engine=spark")
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "cache"}


@pytest.mark.parametrize(
    ("disk", "status", "words"),
    [
        ("ro", cli.MISTAKE, "cannot be used (Read-only file system): name another place"),
        ("size=64k", cli.NOT_SAVED, "cannot be used (No space left on device): make room there, or name another place"),
    ],
)
@pytest.mark.parametrize("way", ["--engine=local", "--part=0/1", ""])
def test_a_place_that_takes_nothing_is_named_in_a_sentence(way, disk, status, words, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "text.txt").write_bytes(b"0123456789" * 20_000)
    done = in_a_disk(disk, tmp_path / "disk", way, tmp_path)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, line.startswith(f"launch.prepare: {tmp_path / 'disk'}")) == (status, True), done.stderr
    assert line.endswith(words) and "Traceback" not in done.stderr


def in_a_disk(disk: str, place: Path, way: str, folder: Path) -> subprocess.CompletedProcess:
    """launch.prepare into a disk that it alone sees."""
    own = [f"--input={folder / 'text.txt'}", f"--cache_dir={folder / 'cache'}", f"--output={place / 'out'}"]
    command = [sys.executable, "-m", "launch.prepare", *own, *([way] if way else [])]
    mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {disk} tmpfs {place} || exit 99; exec "$@"', "sh"]
    try:
        done = subprocess.run([*mounted, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr}")
    return done


@pytest.mark.parametrize("way", ["--engine=local", "--part=0/1", ""])
def test_a_place_below_a_file_or_taken_by_one_is_named_in_a_sentence(way, options, tmp_path, capsys):
    (tmp_path / "file").write_text("taken")
    how = [option for option in options if way or not option.startswith("--part_bytes")]
    for place in ("file", "file/out", "file/a/out"):
        with pytest.raises((ValueError, OSError)) as caught:
            prepare.main(["prepare", *how, f"--output={tmp_path / place}", *([way] if way else [])])
        assert cli.explain("launch.prepare", caught.value) == cli.MISTAKE
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"launch.prepare: {tmp_path / 'file'}" in line and ": " in line and "[Errno" not in line, line
    assert (tmp_path / "file").read_text() == "taken"


def test_the_job_of_kubernetes_runs_as_it_is_written(options, tmp_path):
    job = yaml.safe_load((ROOT / "launch" / "kubernetes" / "prepare.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["values"]) == (container["name"], [cli.MISTAKE])
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy requires it"
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    assert own == {"WORKERS": str(job["spec"]["completions"])}
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    groups = prepare.PrepareFlags(), prepare.CorpusSettings(corpus="")
    flags.parse(["prepare", *container["args"]], "", *groups, renamed={"corpus": "input"})

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    for index in ("1", "0"):
        environment = os.environ | {"JOB_COMPLETION_INDEX": index, "WORKERS": "2"}
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
        command = [*container["command"], *options, f"--output={tmp_path / 'out'}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_manifest(Path(tmp_path / "out")).splits.keys() == {"train", "valid", "test"}


@pytest.mark.parametrize(
    ("task", "least", "most", "count"), [(2, 0, 4, 5), (0, 0, 0, 1), (17, 3, 17, 2), (4, 0, 6, 4), (4, 4, 7, 4)]
)
def test_the_slurm_recipe_gives_each_task_its_share_and_refuses_an_array_with_gaps(task, least, most, count):
    names = {"TASK_ID": task, "TASK_MIN": least, "TASK_MAX": most, "TASK_COUNT": count}
    array = {f"SLURM_ARRAY_{name}": str(value) for name, value in names.items()}
    command = ("bash", ROOT / "launch" / "slurm" / "prepare.sbatch", "--input=a")
    ended = subprocess.run(command, env=os.environ | array | {"PYTHON": "echo"}, capture_output=True, text=True)
    if (least, most) == (0, count - 1):
        assert ended.returncode == 0
        assert ended.stdout == f"-m launch.prepare --part={task}/{count} --workers=1 --input=a\n"
    else:
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("--array is not 0-N without gaps: give 0-N") and ended.stderr.count("\n") == 1
