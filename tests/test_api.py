"""The library: the ten lines train, resume, score and sample, in a plain interpreter, an event loop and a thread."""

import asyncio
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

import charlstm as cl
from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.model import language_model
from charlstm.report import history
from charlstm.run import corpus as corpus_lib
from launch import sample
from launch.support import cli, train_flags
from tests.compiling import xla_flags
from tests.conftest import ROOT
from tests.inspect.conftest import drawn, text_of

TEXT = "".join(f"line {n * n} of a text\n" for n in range(700))
SETTINGS = {
    "hidden_size": 12, "num_layers": 2, "batch_size": 16, "window": 8, "num_steps": 12, "log_every": 6,
    "evaluate_every": 6, "eval_chunk": 64, "burn_in": 8, "learning_rate": 0.5, "sample_every": 0,
}  # fmt: skip
TEN_LINES = f"""
import sys
import charlstm as cl

corpus = cl.load_corpus(open(sys.argv[1]).read(), cache_dir=sys.argv[2])
config = cl.Config(**{SETTINGS!r})
model = cl.train(config, corpus, run_dir=sys.argv[3])
print(model.evaluate(corpus.test).bits_per_character)
print(model.sample("line", length=20, temperature=0.8, seed=0))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cl.load_corpus(TEXT, cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def config() -> Config:
    return cl.Config(**SETTINGS)


@pytest.fixture(scope="module")
def run_dir(config, corpus, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("api") / "run"
    cl.train(config, corpus, directory)
    return directory


@pytest.fixture(scope="module")
def model(run_dir):
    return cl.load(run_dir)


def digest(run_dir: Path) -> str:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["state_digest"]


def test_the_ten_lines_in_a_plain_interpreter_have_the_bits_of_the_program(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
    arguments = [str(tmp_path / name) for name in ("text.txt", "cache", "run")]
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", TEN_LINES, *arguments], **how)
    assert done.returncode == 0, done.stderr
    bits, text = done.stdout.split("\n", 1)
    assert 0 < float(bits) < 8 and text.startswith("line") and len(text) >= 20
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--corpus={arguments[0]}", f"--cache_dir={arguments[1]}", f"--run_dir={tmp_path / 'program'}"]
    program = subprocess.run([sys.executable, "-m", "launch.train", *flags], **how)
    assert program.returncode == 0, program.stderr
    assert digest(tmp_path / "run") == digest(tmp_path / "program")


def test_the_same_call_resumes_and_a_longer_one_goes_on(config, corpus, run_dir, tmp_path):
    half = tmp_path / "half"
    cl.train(cl.Config(**SETTINGS | {"num_steps": 6, "decay_steps": 12}), corpus, half)
    again = cl.train(cl.Config(**SETTINGS | {"decay_steps": 12}), corpus, half)
    assert again.step in (6, 12) and digest(half) == digest(run_dir)
    before = (half / "metrics.jsonl").read_text()
    cl.train(cl.Config(**SETTINGS | {"decay_steps": 12}), corpus, half)
    assert (half / "metrics.jsonl").read_text() == before


def test_in_a_running_event_loop_and_in_a_thread_it_saves_and_has_the_same_bits(config, corpus, run_dir, tmp_path):
    async def cell():
        return cl.train(config, corpus, tmp_path / "loop")

    asyncio.run(cell())
    thread = threading.Thread(target=cl.train, args=(config, corpus, tmp_path / "thread"))
    thread.start()
    thread.join()
    for name in ("loop", "thread"):
        assert digest(tmp_path / name) == digest(run_dir)
        assert "not saved" not in (tmp_path / name / "log.txt").read_text()
        assert (tmp_path / name / "checkpoints" / "12").is_dir()


def test_an_interrupt_saves_and_returns_and_the_same_call_goes_on(config, corpus, run_dir, tmp_path, monkeypatch):
    update, seen = cl.api.loop.Training.update, []

    def interrupted(self, state, batch):
        if int(state.step) == 4:
            seen.append(history.read(self.run.run_dir).state)
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, state, batch)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cl.api.loop.Training, "update", interrupted)
    stopped = cl.train(config, corpus, tmp_path / "run")
    assert [*seen, history.read(tmp_path / "run").state] == ["running", "stopped"]
    assert 4 <= stopped.step < 7 and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    cl.train(config, corpus, tmp_path / "run")
    assert digest(tmp_path / "run") == digest(run_dir)


OF_TWO = f"""
import sys
import charlstm as cl

index, port, text, cache, run_dir = sys.argv[1:]
cl.distributed.join(f"localhost:{{port}}", 2, int(index), 60)
corpus = cl.load_corpus(text, cache_dir=cache)
config = cl.Config(**{SETTINGS | {"batch_size": 2, "num_layers": 1, "num_steps": 2, "evaluate_every": 0}!r})
model = cl.train(config, corpus, run_dir)
print(model.bits("line").sum())
"""


def test_processes_that_have_joined_train_one_run_and_each_has_its_model(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(tmp_path / name) for name in ("text.txt", "cache", "run")]
    how = {"env": os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "text": True}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OF_TWO, index, port, *paths], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
        )
        for index in "01"
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert ended[0][0].splitlines()[-1] == ended[1][0].splitlines()[-1]
    assert "training on 2 x cpu in 2 processes" in (tmp_path / "run" / "log.txt").read_text()


def test_mistakes_are_exceptions_and_write_nothing(config, corpus, tmp_path):
    with pytest.raises(ValueError, match="batch_size=20000"):
        cl.train(cl.Config(**SETTINGS | {"batch_size": 20000}), corpus, tmp_path / "run")
    for make in (cl.Config, functools.partial(config_lib.replace, cl.Config(learning_rate=1))):
        with pytest.raises(ValueError, match="did you mean hidden_size"):
            make(hiden_size=3)
        with pytest.raises(ValueError, match="learning_rate='3e-3' is not a float"):
            make(learning_rate="3e-3")
        with pytest.raises(ValueError, match=r"batch_size=32.0 is not an int"):
            make(batch_size=32.0)
        assert make(learning_rate=0.5).optimizer.learning_rate == 0.5
        swept = make(learning_rate=np.logspace(-3, -2, 2)[0], hidden_size=np.int64(3), skip=np.True_)
        assert [type(value) for value in (swept.optimizer.learning_rate, swept.model.hidden_size)] == [float, int]
    with pytest.raises(ValueError, match="home directory of a user who has none"):
        cl.Config.from_flagfile("~nobody of that name/x.flags")
    with pytest.raises(ValueError, match="min_count=2 is of characters"):
        cl.load_corpus(TEXT, min_count=2, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no recipe 'nothing', only amazon"):
        cl.Config.recipe("nothing")
    for wrong, sentence in (
        ((config, "a.txt"), r"corpus is a str: give the whole of cl\.load_corpus"),
        ((config, corpus.splits["train"]), r"corpus is a Split: give the whole"),
        ((SETTINGS, corpus), r"config is a dict: give cl\.Config.*\*\*d"),
    ):
        with pytest.raises(TypeError, match=sentence):
            cl.train(*wrong, tmp_path / "run")
    for settings, sentence in (
        ({"valid_fraction": "0.1"}, "'0.1' is not a float"),
        ({"min_count": 1.5}, "is not an int"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cl.load_corpus(TEXT, **settings)
    with pytest.raises(ValueError, match="is not a run"):
        cl.load(tmp_path / "run")
    diverging = cl.Config(**SETTINGS | {"learning_rate": 3e38, "clip_norm": 0.0})
    with pytest.raises(cl.Diverged):
        cl.train(diverging, corpus, tmp_path / "diverged")
    assert not (tmp_path / "run").exists()


def test_a_config_that_asks_for_another_corpus_is_refused_and_one_that_was_given_one_takes_it(tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    of_bytes = cl.load_corpus(TEXT, **cache)
    of_characters = cl.load_corpus(TEXT, vocabulary="characters", **cache)
    others = cl.load_corpus("other\n" * 900, vocabulary="characters", **cache)
    for settings, reason in (
        ({"train": "/nowhere"}, "train='/nowhere' was given and .* has train=''"),
        ({"text_field": "body"}, "text_field='body' was given and .* has text_field='text'"),
        ({"vocabulary": "characters"}, "--vocabulary=characters was given .* prepared with bytes"),
        ({"valid_fraction": 0.2}, "valid_fraction=0.2 .* mean splits of"),
        ({"split": "columns:4x8"}, "--split=columns:4x8 was given"),
    ):
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        with pytest.raises(ValueError, match=rf"{reason}.*cl\.load_corpus\(\.\.\., {re.escape(given)}\)"):
            cl.train(cl.Config(**SETTINGS | settings), of_bytes, tmp_path / "refused")
    with pytest.raises(ValueError, match="mixture=a:1,b:1 was given and the corpus is"):
        cl.train(cl.Config(**SETTINGS | {"mixture": "a:1,b:1"}), of_bytes, tmp_path / "refused")
    of_others = cl.Config(**SETTINGS, vocabulary="characters", vocabulary_of=str(others.directory))
    with pytest.raises(ValueError, match=r"--vocabulary_of=.* has the vocabulary .* is prepared with "):
        cl.train(of_others, of_characters, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"{n} of a text"}) + "\n" for n in range(900)))
    lines = cl.load_corpus(documents, vocabulary="characters", document_separator=r"\n", valid_fraction=0.2, **cache)
    trained = cl.train(cl.Config(**SETTINGS | {"num_steps": 2, "decay_steps": 2}), lines, tmp_path / "run")
    assert trained.config.corpus.vocabulary == "characters"
    assert trained.config.corpus.document_separator == lines.document_separator == r"\n"


def test_the_flags_of_a_run_begun_in_python_begin_another(config, corpus, run_dir):
    flags = cl.Config.from_flagfile(run_dir / "flags.txt")
    assert flags.model == config.model and flags.optimizer == config.optimizer and flags.streams == config.streams
    assert flags.corpus == corpus.settings and flags.corpus.corpus.endswith(".txt")


def test_a_run_begun_in_python_has_its_text_from_anywhere_and_not_within_itself(tmp_path, monkeypatch):
    texts, prepared = tmp_path / "texts", tmp_path / "prepared"
    texts.mkdir()
    (texts / "a.txt").write_text(TEXT)
    (texts / "b.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    alike = {"vocabulary": "characters", "min_count": 9}
    of_text = cl.load_corpus("texts/a.txt", cache_dir="cache", valid_fraction=0.1, **alike)
    shutil.copytree(of_text.directory, prepared)
    corpora = {
        "text": of_text,
        "directory": cl.load_corpus("prepared"),
        "explicit": cl.load_corpus("", train="texts/a*.txt", valid="texts/b.txt", cache_dir="cache", **alike),
        "mixture": cl.load_mixture({"texts/a.txt": 1, "b=texts/b.txt": 3}, cache_dir="cache", **alike),
    }
    config = cl.Config(**SETTINGS | {"num_steps": 1, "evaluate_every": 0})
    begun = {name: corpus_lib.taken(config, corpus) for name, corpus in corpora.items()}
    for corpus in (cl.load_corpus("texts", cache_dir="cache"), corpora["directory"]):
        with pytest.raises(ValueError, match="lies inside of the corpus"):
            cl.train(config, corpus, Path(corpus.settings.corpus) / "run")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, settings in begun.items():
        assert corpus_lib.load(settings).fingerprint == corpora[name].fingerprint
        again, _ = corpus_lib.open_for(settings, config_lib.to_flags(settings))
        assert again.fingerprint == corpora[name].fingerprint


def test_a_step_is_a_number_or_its_digits(model, run_dir):
    for step in (12, "12"):
        assert cl.load(run_dir, step).step == 12
    with pytest.raises(ValueError, match="checkpoint='x' is neither best, nor latest, nor a step"):
        cl.load(run_dir, "x")


def test_a_recipe_is_its_flagfile():
    recipe = cl.Config.recipe("tinyshakespeare")
    assert recipe == cl.Config.from_flagfile(ROOT / "configs" / "tinyshakespeare.flags")
    assert cl.Config.recipe("tinyshakespeare", num_steps=9) == config_lib.replace(recipe, num_steps=9)
    (_, _, _, parsed, _) = train_flags.parse(["train", f"--flagfile={ROOT / 'configs' / 'tinyshakespeare.flags'}"])
    assert recipe == parsed


def test_a_corpus_is_a_path_a_name_or_a_text(corpus, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    cache = str(tmp_path / "cache")
    sources = [str(tmp_path / "text.txt"), tmp_path / "text.txt", TEXT.encode(), str(corpus.directory)]
    assert {cl.load_corpus(source, cache_dir=cache).fingerprint for source in sources} == {corpus.fingerprint}
    assert cl.load_corpus(TEXT, cache_dir=cache, vocabulary="characters").vocabulary.size < 40
    with pytest.raises(ValueError, match="does not exist"):
        cl.load_corpus(tmp_path / "nothing.txt", cache_dir=cache)


# A model.


def test_bits_add_up_to_the_score_and_calls_with_carried_state_to_the_bits(model):
    text = TEXT[:700]  # several windows
    bits = model.bits(text)
    whole = cl.Model(cl.api.config_lib.replace(model.config, eval_chunk=700), *list(vars(model).values())[1:])
    assert bits.dtype == np.float32 and bits.shape == (700,)
    assert bits.sum() == pytest.approx(whole.evaluate(text).bits, rel=1e-5)
    ids, state, found = np.frombuffer(text.encode(), np.uint8), None, []
    for part in (ids[:300], ids[300:699]):
        logits, state = model(part, state)
        found.append(np.asarray(logits))
    log_p = np.concatenate(found) - np.logaddexp.reduce(np.concatenate(found), axis=1, keepdims=True)
    expected = -log_p[np.arange(699), ids[1:]] / np.log(2)
    np.testing.assert_allclose(bits[1:], expected, rtol=1e-4, atol=1e-4)
    assert bits[0] == 8
    assert model.bits("").shape == (0,) and model.bits("a").tolist() == [8]


def test_no_symbols_have_no_logits_and_leave_the_state_and_symbols_that_there_are_not_are_refused(model):
    _, state = model([97, 98])
    for ids, shape in (([], (0, 256)), (np.zeros((1, 0), int), (1, 0, 256))):
        logits, after = model(ids, state)
        assert logits.shape == shape and after is state and model(ids)[0].shape == shape
    for ids, wrong in (([1, 999], 999), ([[1, -1]], -1), (np.array([256]), 256)):
        with pytest.raises(ValueError, match=f"id {wrong} is none of 256 symbols: ids are from 0 to 255"):
            model(ids)


def test_states_are_those_that_calls_end_with(model):
    text = TEXT[:300]
    states = model.states(text)
    assert [(s.h.shape, s.c.shape) for s in states] == [((300, 12), (300, 12))] * 2
    for stop in (1, 256, 257, 300):
        _, state = model(np.frombuffer(text[:stop].encode(), np.uint8))
        for all_of_layer, last in zip(states, state, strict=True):
            np.testing.assert_allclose(all_of_layer.h[stop - 1], last.h[0], rtol=2e-5, atol=2e-6)
            # A gate that is shut is 0 or 2**-23.4, as it is compiled, which c adds up over the symbols.
            np.testing.assert_allclose(all_of_layer.c[stop - 1], last.c[0], rtol=2e-5, atol=5e-5)


def test_a_sample_is_the_text_of_the_program_and_a_stream_its_pieces(model, run_dir, capsys):
    how = {"length": 150, "temperature": 0.7, "top_k": 9, "seed": 3}
    flags = [f"--{name}={value}" for name, value in how.items()]
    assert sample.main(["sample", f"--run_dir={run_dir}", "--prompt=line", "--format=json", *flags]) == cli.DONE
    text = "line" + json.loads(capsys.readouterr().out)["text"]
    assert model.sample("line", **how) == text
    pieces = list(model.stream("line", **how))
    assert "".join(pieces) == text and len(pieces) > 3
    several = model.sample("line", num_samples=3, **how)
    assert several[0] == text and len(set(several)) == 3
    assert model.sample("line", **how, stop="i").count("i") == 1
    with pytest.raises(ValueError, match="temperature=-1"):
        model.sample(temperature=-1.0)


def test_a_score_is_of_splits_and_texts(model, corpus):
    assert model.evaluate(corpus.test).symbols == len(corpus.test)
    ids = corpus.test.read(0, len(corpus.test))
    assert model.evaluate(ids.tobytes()).bits == pytest.approx(model.evaluate(corpus.test).bits)
    assert model.evaluate("größe\n").bytes == 8 and model.evaluate("größe\n").characters == 6
    with pytest.raises(ValueError, match="at least 2"):
        model.evaluate("a")


def test_a_text_is_scored_in_chunks_as_a_split_is_and_its_bits_are_those_of_one_stream():
    model, text, burn_in, chunk = drawn(), text_of(700), 3, 50  # a model that remembers
    config = cl.api.config_lib.replace(model.config, eval_chunk=chunk, burn_in=burn_in)
    bits = cl.Model(config, *list(vars(model).values())[1:]).evaluate(text).bits
    starts = range(0, 700, chunk)  # the first symbol of a chunk is expected from the one before it
    parts = [text[max(0, start - burn_in - 1) : start + chunk] for start in starts]
    by_hand = sum(model.bits(part)[-chunk:].sum() for part in parts)
    assert bits == pytest.approx(by_hand, rel=1e-5)
    assert bits != pytest.approx(model.bits(text).sum(), rel=1e-4)


def test_what_a_model_does_not_know_is_said_with_a_remedy_that_there_is_in_python():
    model = drawn()  # of characters
    for how in ({"prompt": "aZ"}, {"stop": "aZ"}):
        with pytest.raises(ValueError, match=r"^'Z' \(U\+005A\) at position 1 is not in the vocabulary: leave it out$"):
            model.sample(**how)


def test_the_functional_level_is_there():
    assert cl.model.apply is language_model.apply and cl.model.init is language_model.init
    assert callable(cl.training.make_step) and callable(cl.distributed.make)
    assert set(cl.__all__) <= set(dir(cl)) | {name for name in cl.__all__ if hasattr(cl, name)}


@pytest.mark.long
def test_in_a_notebook_it_resumes_after_a_kernel_restart_and_has_the_same_bits(run_dir, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    cell = (
        "import charlstm as cl\n"
        f"corpus = cl.load_corpus({str(tmp_path / 'text.txt')!r}, cache_dir={str(tmp_path / 'cache')!r})\n"
        f"settings = {SETTINGS!r} | {{'decay_steps': 12}}\n"
        f"model = cl.train(cl.Config(**settings | {{'num_steps': NUMBER}}), corpus, {str(tmp_path / 'run')!r})\n"
        "print(model.sample('line', length=20, seed=0))\n"
    )
    for number in (6, 12):  # each in a kernel of its own
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.replace("NUMBER", str(number)))])
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
        printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
        assert "line" in printed and f"\rstep {number}/{number}" in printed
    assert digest(tmp_path / "run") == digest(run_dir)
