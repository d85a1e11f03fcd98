"""launch.inspect, launch.evaluate --text and launch.sample --clamp on a run: what they print, write and refuse."""

import base64
import gzip
import json
import os
import re
import shutil

import numpy as np
import pytest

import charlstm as cl
from launch import evaluate, inspect, sample
from launch.support import cli
from tests.launch.conftest import refusal


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("".join("abc (def) gh\n" for _ in range(40)).encode() + "é€".encode() + b"\xff")
    return path


def ran(main, capsys, *arguments) -> str:
    assert main(["program", *map(str, arguments)]) == cli.DONE
    return capsys.readouterr().out


def test_a_unit_is_shown_in_the_terminal_and_as_a_picture(trained, text, tmp_path, capsys):
    run = f"--run_dir={trained}"
    plain = ran(inspect.main, capsys, run, f"--text={text}", "--unit=1:3", "--length=26")
    assert plain.startswith("tanh(1.c:3) of step ") and plain.count("abc (def) gh↵") == 2 and "\x1b" not in plain
    colored = ran(inspect.main, capsys, run, f"--text={text}", "--unit=1.f:3", "--colors=24bit", "--scale=fixed")
    assert "48;2;" in colored and colored.startswith("1.f:3 of step ") and "⟦FF⟧" in colored
    svg = tmp_path / "unit.svg"
    ran(inspect.main, capsys, run, f"--text={text}", "--unit=1:3", f"--output={svg}")
    assert svg.read_text().startswith("<svg")


def head_of(path) -> str:
    """The JSON of a page's first model."""
    return gzip.decompress(base64.b64decode(re.search('id="head-0">([^<]*)', path.read_text())[1])).decode()


def test_find_ranks_the_units_on_a_text_or_the_runs_own(trained, text, capsys):
    found = json.loads(
        ran(inspect.main, capsys, f"--run_dir={trained}", f"--text={text}", r"--find=\([^)]*", "--format=json")
    )
    assert found["inside"] == 40 * 4 and found["units"][0]["unit"].startswith("1.c:")
    table = ran(inspect.main, capsys, f"--run_dir={trained}", "--find=[ab]")
    assert "symbols are inside" in table and len(table.splitlines()) == 2 + 8


def test_the_runs_own_text_is_refused_if_another_stands_in_its_place(copied):
    config = copied / "config.json"
    config.write_text(config.read_text().replace("/text.txt", "/other.txt"))
    said = refusal(inspect.main, f"--run_dir={copied}", "--unit=1:3")
    assert "was trained on the corpus with fingerprint" in said and said.endswith(": give --text")


def test_a_page_is_written_beside_nothing_and_over_nothing_but_its_own(trained, text, tmp_path, capsys):
    output, flags = tmp_path / "a.html", (f"--run_dir={trained}", f"--text={text}", "--saliency=0")
    ran(inspect.main, capsys, *flags, f"--output={output}", "--length=100")
    first = output.read_bytes()
    ran(inspect.main, capsys, *flags, f"--output={output}", f"--other={trained}@20")
    assert output.read_bytes() != first and output.read_bytes().count(b'<section class="run"') == 2
    output.write_text("mine")
    assert "add --overwrite" in refusal(inspect.main, *flags, f"--output={output}")
    assert output.read_text() == "mine"
    ran(inspect.main, capsys, *flags, f"--output={output}", "--overwrite", "--unit=1.f:3")
    assert '"place": 3, "array": 1' in head_of(output)
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "text.txt"}


def test_a_probe_that_cannot_be_fitted_is_refused_before_the_text_is_read(trained, text, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="extra inspect is not installed")
    monkeypatch.setattr("charlstm.inspect.inspection.inspect", None)
    flags = (f"--run_dir={trained}", f"--text={text}", f"--output={tmp_path / 'a.html'}")
    said = refusal(inspect.main, *flags, "--probe=[ab]|digit")
    assert "no probe of 'digit' can be fitted" in said and said.endswith("use another pattern or text")


def test_another_run_may_have_an_at_sign_in_its_path(copied, tmp_path, capsys):
    other, output = copied.parent / "me@work", tmp_path / "a.html"
    shutil.copytree(copied, other)
    flags = (f"--run_dir={copied}", "--saliency=0", "--length=20", f"--output={output}")
    for given, title in ((other, "me@work"), (f"{other}@20", "me@work@20")):
        ran(inspect.main, capsys, *flags, f"--other={given}")
        assert f"<title>{copied.name}, {title}" in output.read_text()
    for missing in ("nowhere", "me@home", "me@home@20"):  # before the text is read, and it is none
        folder = missing.rpartition("@")[0] or missing
        said = refusal(inspect.main, *flags, "--text=nowhere", f"--other={copied.parent / missing}")
        assert f"other={copied.parent / folder} is not a run" in said


def test_a_terminal_without_a_size_has_lines_of_80_columns(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "long.txt").write_text("a" * 200)
    flags = (f"--run_dir={trained}", f"--text={tmp_path / 'long.txt'}", "--unit=1:3", "--colors=none")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "\n" + 80 * "a" + "\n" in ran(inspect.main, capsys, *flags)
    monkeypatch.setenv("COLUMNS", "50")
    assert "\n" + 50 * "a" + "\n" in ran(inspect.main, capsys, *flags)


def test_a_page_names_the_run_however_it_is_named(trained, text, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a.html"
    flags = (f"--text={text}", "--saliency=0", "--length=20", f"--output={output}")
    monkeypatch.chdir(trained)
    ran(inspect.main, capsys, "--run_dir=.", "--other=.@20", *flags)
    assert "<title>trained, trained@20" in output.read_text()
    monkeypatch.chdir(trained / "checkpoints")
    ran(inspect.main, capsys, "--run_dir=..", f"--other={os.path.relpath(trained)}", *flags)
    assert f"<title>trained, {trained / 'checkpoints' / '..'}" in output.read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--unit=1:8"], "the 8 units of layer 1 are 0 to 7"),
        (["--find=("], "is no regular expression"),
        (["--find=zzz"], "matches nothing"),
        ([], "nothing to show"),
        (["--output=a.pdf"], "neither .html nor .svg"),
        (["--output=a.svg"], "give --unit as well"),
        (["--output=a.html", "--arrays=r"], "'r' is none of c, h, i, f, g, o"),
        (["--unit=1:0", "--length=30000"], "must be from 1 to 20000"),
        # Before the text is read, and it is none.
        (["--text=nowhere", "--output=none/a.html"], "there is no directory none"),
        (["--text=nowhere", "--output=a.html", "--arrays=r"], "'r' is none of c, h, i, f, g, o"),
        (["--text=nowhere", "--output=a.html", "--probe=digit|("], "is no regular expression"),
        *(
            (["--find=a", flag], "give --output=inside.html as well")
            for flag in ("--probe=a", "--other=a", "--arrays=h")
        ),
        (["--unit=1:0", "--saliency=9"], "--saliency is of the page"),
        (["--find=a", "--length=9"], "--length is of the text that is shown"),
        (["--unit=1:0", "--output=a.html", "--scale=fixed"], "--scale is of one unit"),
        (["--unit=1:0", "--output=a.svg", "--colors=256"], "--colors is of the terminal"),
        (["--unit=1:0", "--format=json"], "--format is of --find"),
        (["--unit=1:0", "--overwrite"], "--overwrite is of --output"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_refused(flags, sentence, trained, text):
    assert sentence in refusal(inspect.main, f"--run_dir={trained}", f"--text={text}", *flags)
    assert "--run_dir is required" in refusal(inspect.main, "--unit=1:0")
    assert "text=nowhere cannot be read" in refusal(inspect.main, f"--run_dir={trained}", "--text=nowhere", "--find=a")
    assert "text=. is a directory" in refusal(inspect.main, f"--run_dir={trained}", "--text=.", "--find=a")


def test_a_text_is_scored_symbol_by_symbol(trained, text, capsys):
    flags = (f"--run_dir={trained}", f"--text={text}")
    lines = [json.loads(line) for line in ran(evaluate.main, capsys, *flags, "--format=jsonl").splitlines()]
    assert bytes(line["symbol"] for line in lines) == text.read_bytes()
    model = cl.load(trained)
    np.testing.assert_allclose([line["bits"] for line in lines], model.bits(text.read_bytes()), atol=1e-4)
    assert lines[0]["rank"] == 1 + text.read_bytes()[0] and all(1 <= line["rank"] <= 256 for line in lines)
    whole = json.loads(ran(evaluate.main, capsys, *flags, "--format=json"))
    assert whole["bits_per_byte"] == pytest.approx(np.mean([line["bits"] for line in lines]), rel=1e-5)
    assert f"{whole['bits_per_byte']:.4f} bits per byte" in ran(evaluate.main, capsys, *flags)
    assert "give --text as well" in refusal(evaluate.main, f"--run_dir={trained}", "--format=jsonl")
    for flag in (
        "--dynamic",
        "--split=test",
        "--eval_chunk=10",
        "--burn_in=5",
        "--evaluation_batch_size=2",
        "--dynamic_decay=1",
    ):
        assert f"leave {flag.partition('=')[0]} out" in refusal(evaluate.main, *flags, flag)
    (text.parent / "empty").touch()
    assert "is empty" in refusal(evaluate.main, flags[0], f"--text={text.parent / 'empty'}")


def test_a_held_unit_writes_what_the_library_does(trained, capsys):
    flags = (f"--run_dir={trained}", "--prompt=ab", "--length=30", "--format=json")
    clamp = {f"1:{unit}": 4 * (-1) ** unit for unit in range(7)} | {"1.h:7": -1}  # of a model that has hardly learned
    given = ",".join(f"{unit}:{value:+d}" for unit, value in clamp.items())
    held, free = (json.loads(ran(sample.main, capsys, *flags, *more)) for more in ([f"--clamp={given}"], []))
    assert "ab" + held["text"] == cl.load(trained).sample("ab", 30, clamp=clamp)
    assert held["text"] != free["text"]
    assert "there is no unit 1:9" in refusal(sample.main, *flags, "--clamp=1:9:1")
    assert "has no value" in refusal(sample.main, *flags, "--clamp=1:3")


def test_without_the_extra_a_probe_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    flags = (f"--run_dir={trained}", "--text=nowhere", f"--output={tmp_path / 'a.html'}", "--saliency=0")
    assert refusal(inspect.main, *flags, "--probe=digit").endswith("pip install 'charlstm[inspect]'")
