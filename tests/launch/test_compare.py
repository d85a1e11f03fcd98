"""Runs side by side: the table, the settings that differ, the curves, the picture, and the page in a browser."""

import json
import os
import re
import shutil
import subprocess
import time
import types
from pathlib import Path

import pytest

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.inspect import patterns
from charlstm.report import curves, history
from charlstm.report import page as page_lib
from charlstm.run import run_directory
from launch import compare, train
from launch.support import cli
from tests.launch.conftest import refusal

LOOKS = ("--evaluate_every=10", "--sample_every=20", "--sample_length=20", "--log_every=10")


@pytest.fixture(scope="module")
def runs(folder, arguments):
    """A run of 40 steps, and one with another learning rate that was stopped after 30."""
    for name, flags in {"first": (), "second": ("--learning_rate=0.002", "--num_steps=30")}.items():
        command = ["train", *arguments, *LOOKS, f"--run_dir={folder / name}", *flags]
        assert train.main(command) == cli.DONE
    second = folder / "second" / "metrics.jsonl"
    lines = [json.loads(line) for line in second.read_text().splitlines()]
    del lines[-1]["state_digest"]
    second.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / "first"), str(folder / "second")]


def shown(capsys, *arguments) -> str:
    assert compare.main(["compare", *arguments]) == cli.DONE
    return capsys.readouterr().out


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in open(f"{run_dir}/metrics.jsonl")]


def test_the_json_has_each_run_in_figures(runs, capsys):
    found = json.loads(shown(capsys, *runs, "--format=json"))
    assert found["figure"] == "bits_per_byte"
    for row, run_dir, state, step, rate in zip(
        found["runs"], runs, ("finished", "stopped"), (40, 30), (0.01, 0.002), strict=True
    ):
        scores = {line["step"]: line["bits_per_byte"] for line in lines(run_dir) if line["split"] == "valid"}
        assert (row["run"], row["state"], row["step"], row["num_steps"]) == (run_dir.split("/")[-1], state, step, step)
        assert row["best"] == min(scores.values()) == scores[row["best_step"]] and row["last"] == scores[step]
        assert row["symbols"] == step * 16 * 16 and row["parameters"] == 256 * 4 + 12 * 32 + 64 + 8 * 256 + 256
        assert row["settings"]["learning_rate"] == rate and row["settings"]["num_steps"] == step


def test_the_best_is_that_of_the_checkpoints_where_a_setting_of_evaluation_was_changed(runs, arguments, tmp_path):
    run_dir = shutil.copytree(runs[0], tmp_path / "run")
    more = ("--num_steps=50", "--eval_chunk=2", "--burn_in=0", f"--run_dir={run_dir}")
    assert train.main(["train", *arguments, *LOOKS, *more]) == cli.DONE
    scores = {line["step"]: line["bits_per_byte"] for line in lines(run_dir) if line["split"] == "valid"}
    row = history.read(run_dir).row("bits_per_byte")
    assert (row["best"], row["best_step"]) == (scores[50], 50) and min(scores.values()) < scores[50]


def test_where_no_checkpoint_says_it_the_best_is_of_the_lines_that_scored_as_many_symbols_as_the_last(tmp_path):
    scored = {10: (50, 1.0), 20: (100, 3.0), 30: (100, 2.0), 40: (100, 2.5)}
    lines = [
        {"step": step, "split": "valid", "scored_symbols": symbols, "bits_per_byte": bits}
        for step, (symbols, bits) in scored.items()
    ]
    row = history.History("run", tmp_path, Config(), 1, lines, [], "stopped").row("bits_per_byte")
    assert (row["best"], row["best_step"], row["last"]) == (2.0, 30, 2.5)


def test_a_run_that_goes_on_to_more_steps_is_not_finished_yet(runs, tmp_path):
    run_dir = shutil.copytree(runs[0], tmp_path / "run")
    assert history.read(run_dir).state == "finished"
    run_directory.write_config(run_dir, config_lib.replace(run_directory.read(run_dir)[0], num_steps=80))
    assert history.read(run_dir).state == "stopped"


def test_a_run_that_was_stopped_between_two_lines_is_at_the_step_that_it_saved(runs, tmp_path):
    run_dir = shutil.copytree(runs[0], tmp_path / "run")
    (run_dir / "checkpoints" / "40").rename(run_dir / "checkpoints" / "43")
    row = history.read(run_dir).row("bits_per_byte")
    assert (row["step"], row["symbols"], row["last"]) == (
        43,
        43 * 16 * 16,
        history.read(Path(runs[0])).row("bits_per_byte")["last"],
    )


def test_runs_of_characters_alone_are_compared_per_character_others_per_byte():
    line = {"split": "valid", "bits_per_byte": 2.0, "bits_per_character": 2.0, "bits_per_symbol": 2.0}
    a, b, c = (
        history.History("run", Path("run"), Config(vocabulary=kind), 1, [line], [], "finished")
        for kind in ("characters", "characters", "bytes")
    )
    assert history.common_figure([a, b]) == "bits_per_character" and history.common_figure([a, c]) == "bits_per_byte"


def test_the_terminal_shows_the_table_the_settings_that_differ_and_curves(runs, capsys, monkeypatch):
    pytest.importorskip("uniplot", reason="extra compare is not installed")
    table, settings, curves = shown(capsys, *runs).split("\n\n", 2)
    assert re.search(r"^first +finished +40/40 ", table, re.M) and re.search(r"^second +stopped +30/30 ", table, re.M)
    assert re.search(r"^learning_rate +0.01 +0.002$", settings, re.M) and "seed" not in settings
    assert "bits per byte by step" in curves and "11 first" in curves and "22 second" in curves
    assert "\x1b" not in curves and all(re.search(rf"│[^│]*{sign * 2}", curves) for sign in "12")
    monkeypatch.setattr(cli, "terminal_colors", lambda: 256)
    assert re.search("\x1b.*██.* first", shown(capsys, *runs)) and "│ 11" not in shown(capsys, runs[0])


def test_what_is_wider_than_the_terminal_is_left_out_or_stands_below(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    read = history.read_all([history.Path(run) for run in runs])
    long = [
        run._replace(
            name=f"run-{number}", config=config_lib.replace(run.config, corpus=f"{'/folder' * 9}/{number}.txt")
        )
        for number, run in enumerate(read * 4)
    ]
    table, *settings = compare.tables(long, "bits_per_byte")
    lines = "\n".join(settings).split("\n")
    assert max(map(len, [*lines, *table.split("\n")])) <= 70 and len(settings) == 4
    assert table.split("\n")[1].split() == ["run", "state", "step", "best", "train", "symbols/s", "time"]
    for number in range(8):
        assert any(line.endswith(f"/{number}.txt") or f"/{number}.txt  …" in line for line in lines)


@pytest.mark.parametrize("color", [False, True])
def test_any_number_of_curves_can_be_drawn(runs, color):
    pytest.importorskip("uniplot", reason="extra compare is not installed")
    (run,) = history.read_all([history.Path(runs[0])])
    many = [run._replace(name=f"run-{number}") for number in range(2 * len(curves.SIGNS) + 3)]
    drawn = curves.in_terminal(many, "bits_per_byte", "steps", 80, color)
    assert all(one.name in drawn for one in many)


@pytest.mark.parametrize(
    ("is_terminal", "environment", "colors"),
    [
        (False, {"TERM": "xterm", "COLORTERM": "truecolor"}, 0),
        (True, {"TERM": "xterm", "COLORTERM": "truecolor"}, 1 << 24),
        (True, {"TERM": "xterm"}, 256),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, 0),
        (True, {"TERM": "dumb"}, 0),
    ],
)
def test_a_terminal_has_the_colors_that_it_says(is_terminal, environment, colors, monkeypatch):
    for name in ("TERM", "COLORTERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", types.SimpleNamespace(isatty=lambda: is_terminal))
    assert cli.terminal_colors() == colors


@pytest.mark.parametrize("by", ["steps", "symbols", "time"])
def test_curves_are_drawn_by_steps_symbols_or_time(by, runs):
    (run,) = history.read_all([history.Path(runs[0])])
    xs, ys = run.curve("valid", "bits_per_byte", by)
    valid = [line for line in lines(runs[0]) if line["split"] == "valid"]
    expected = {
        "steps": [10, 20, 30, 40],
        "symbols": [2560, 5120, 7680, 10240],
        "time": [line["seconds"] for line in valid],
    }
    assert xs == expected[by] and ys == [line["bits_per_byte"] for line in valid]


def test_a_run_that_has_a_fresh_heartbeat_is_running_and_one_whose_process_died_is_stopped(runs, tmp_path):
    run_dir = history.Path(shutil.copytree(runs[1], tmp_path / "run"))
    (run_dir / "heartbeats").mkdir()
    for age, state in ((1, "running"), (1000, "stopped")):
        beat = json.dumps({"time": time.time() - age})
        (run_dir / "heartbeats" / "process-0.json").write_text(beat)
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"step": 3')  # a line that is being written
        assert history.read(run_dir).state == state


def test_the_plot_is_a_picture_and_as_svg_the_same_each_time(runs, tmp_path):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    for name in ("a.svg", "b.svg", "a.png"):
        assert compare.main(["compare", *runs, f"--plot={tmp_path / name}", "--by=symbols"]) == cli.DONE
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text() and 'id="curve-1"' in svg and ">first<" in svg
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_where_there_is_one_score_the_picture_shows_how_it_was_trained(runs):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    (run,) = history.read_all([history.Path(runs[0])])
    once = run._replace(records=[line for line in run.records if line["split"] == "train" or line["step"] == 40])
    low, high = curves.figure([once], "bits_per_byte").axes[0].get_ylim()
    trained = sorted(once.curve("train", "bits_per_byte")[1])
    assert low < trained[0] and trained[-2] < high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [3, 20, 60])
def test_the_legend_has_every_name_as_it_is_and_leaves_the_axes_free(runs, count):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    (run,) = history.read_all([Path(runs[0])])
    names = ["_under", "m$^$n", "a$b$c", *(f"run-{number}" for number in range(3, count))]
    many = [run._replace(name=name) for name in names]
    assert [name for name in names if f">{name}<" not in curves.svg(many, "bits_per_byte")] == []
    drawn = curves.figure(many, "bits_per_byte")
    drawn.draw_without_rendering()
    for legend in drawn.legends:
        assert drawn.axes[0].get_tightbbox().x1 <= legend.get_window_extent().x0
        assert legend.get_window_extent().y0 >= 0
    assert bool(drawn.legends) == (count > 16) and ('id="legend_1"' in curves.svg(many, "bits_per_byte"))
    assert ('id="legend_1"' in page_lib.render(many, "bits_per_byte")) == (count <= 16)


@pytest.mark.filterwarnings("error")
def test_a_name_that_is_not_utf8_or_that_the_font_lacks_is_drawn_without_a_warning(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    (run,) = history.read_all([Path(runs[0])])
    named = [run._replace(name=name) for name in ("caf\udce9", "実験")]
    svg = curves.svg(named, "bits_per_byte")
    assert ">caf?<" in svg and ">実験<" in svg and curves.png(named, "bits_per_byte")[1] == "実験"
    shutil.copytree(runs[0], tmp_path / "実験")
    assert compare.main(["compare", str(tmp_path / "実験"), f"--plot={tmp_path / 'a.png'}"]) == cli.DONE
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"{tmp_path / 'a.png'} has boxes for 実験, which its font lacks: --plot=NAME.svg has them"
    ]


def test_columns_of_a_table_stand_below_each_other_whatever_their_characters_are_as_wide_as(runs):
    read = history.read_all([Path(run) for run in runs])
    for table in compare.tables([read[0]._replace(name="実験その一"), read[1]], "bits_per_byte"):
        assert len({patterns.columns(line) for line in table.splitlines()[-2:]}) == 1, table


def test_a_value_of_a_setting_is_drawn_as_it_is():
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    assert ">$a$<" in curves.slices_svg({"document_separator": (["$a$", "b"], [1.0, 2.0])}, "bits per symbol")


@pytest.fixture(scope="module")
def page(runs, folder):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    path = folder / "compare.html"
    assert compare.main(["compare", *runs, f"--page={path}"]) == cli.DONE
    return path


def test_the_page_is_one_file_that_fetches_nothing_and_has_the_samples_by_step(page, runs):
    content = page.read_text()
    assert not re.search(r"(src|href)=\"(?!#)", content) and "@import" not in content
    assert content.count("<details") == 3  # of the steps 20, 30 and 40
    assert content.index("<summary>step 40<") < content.index("<summary>step 30<") < content.index("<summary>step 20<")
    assert 'http-equiv="refresh"' not in content


def test_in_a_browser_without_a_network_a_run_can_be_hidden_and_that_outlives_a_reload(page):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium to open the page in")
    clicks = "<script>document.querySelector('tr[data-run=\"1\"]').click()</script></body>"
    clicked = page.with_name("clicked.html")
    clicked.write_text(page.read_text().replace("</body>", clicks))
    for address in (f"file://{clicked}", f"file://{page}#1"):  # the latter is what a click leaves in the address
        how = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}"]
        command = [browser, *how, "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"HOME": "/tmp"})
        assert re.search(r'<tr data-run="0"( class="")?>', done.stdout), done.stderr
        assert '<tr data-run="1" class="off">' in done.stdout
        assert re.search(r'id="curve-1" style="display: none;"', done.stdout)
        assert not re.search(r'id="curve-0" style="display: none;"', done.stdout)


def test_it_follows_runs_that_go_on(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    seen = []

    def sleep(seconds):
        seen.append((seconds, (tmp_path / "page.html").read_text()))
        (tmp_path / "page.html").unlink()
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        compare.main(["compare", *runs, f"--page={tmp_path / 'page.html'}", "--follow=7"])
    assert [seconds for seconds, _ in seen] == [7, 7] and '<meta http-equiv="refresh" content="7">' in seen[1][1]
    said = re.findall(r"page\.html: \d+ KB, written again every 7 s until Ctrl-C", capsys.readouterr().err)
    assert len(said) == 1


def test_a_run_that_cannot_be_read_is_left_out_and_named_once(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="extra compare is not installed")
    first, gone, torn = (Path(shutil.copytree(runs[0], tmp_path / name)) for name in ("first", "gone", "torn"))
    (torn / "identity.json").write_text('{"vocab')
    times = []

    def sleep(seconds):
        times.append(seconds)
        gone.rename(tmp_path / "elsewhere") if len(times) == 1 else (first / "config.json").unlink()

    monkeypatch.setattr(compare.time, "sleep", sleep)
    named, page = (str(first), str(gone), str(torn)), tmp_path / "page.html"
    with pytest.raises(ValueError, match="first is not a run"):
        compare.main(["compare", *named, f"--page={page}", "--follow=1"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(said) == 2 and "torn/identity.json is damaged" in said[0] and "gone is not a run" in said[1]
    assert len(times) == 2 and "<h1>1 run," in page.read_text()
    assert "identity.json is damaged" in refusal(compare.main, str(torn))


def test_lines_that_are_no_objects_are_left_out(runs, tmp_path):
    run_dir = Path(shutil.copytree(runs[0], tmp_path / "run"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run_dir / name, "a") as file:
            file.write("7\n[1]\n" + "[" * 100_000 + "\n")
    assert history.read(run_dir)[1:] == history.read(Path(runs[0]))._replace(run_dir=run_dir)[1:]


def test_a_run_named_twice_is_there_once(runs, tmp_path, capsys):
    (tmp_path / "link").symlink_to(runs[0])
    named = (runs[0], runs[1], f"{runs[0]}/", os.path.relpath(runs[1]), str(tmp_path / "link"))
    assert len(json.loads(shown(capsys, *named, "--format=json"))["runs"]) == 2


@pytest.mark.parametrize(("folder_in_it", "named"), [(".", "."), ("checkpoints", ".."), ("..", "first")])
def test_a_run_has_its_name_from_wherever_it_is_named(folder_in_it, named, runs, monkeypatch):
    monkeypatch.chdir(Path(runs[0]) / folder_in_it)
    assert [run.name for run in history.read_all([Path(named), Path(runs[1])])] == ["first", "second"]


def test_flags_stand_anywhere_and_take_a_value_after_a_space(runs, capsys):
    rows = [
        json.loads(shown(capsys, *line))["runs"]
        for line in ([*runs, "--format=json"], ["--format", "json", *runs], [runs[0], "--format", "json", runs[1]])
    ]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 2
    assert "unknown flag --pages" in refusal(compare.main, runs[0], "--pages", "out.html")


def test_what_is_no_run_is_left_out_and_none_at_all_is_refused(runs, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    found = json.loads(shown(capsys, str(tmp_path / "notes"), runs[0], "--format=json"))
    assert [row["run"] for row in found["runs"]] == ["first"]
    assert "there is no run in" in refusal(compare.main, str(tmp_path / "notes"))
    assert f"{tmp_path}/typo does not exist" in refusal(compare.main, runs[0], f"{tmp_path}/typo")
    assert "name the runs" in refusal(compare.main)
    assert "neither .svg nor .png" in refusal(compare.main, runs[0], "--plot=a.pdf")
    assert "give --page or --plot as well" in refusal(compare.main, runs[0], "--follow=3")
    for place in ("--page=none/a.html", "--plot=none/a.svg"):
        assert "there is no directory none" in refusal(compare.main, runs[0], place)


def test_without_the_extra_it_says_what_to_install(runs, monkeypatch):
    for package in ("uniplot", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    assert refusal(compare.main, runs[0]).endswith("pip install 'charlstm[compare]'")
    assert refusal(compare.main, runs[0], "--plot=a.svg").endswith("pip install 'charlstm[compare]'")
