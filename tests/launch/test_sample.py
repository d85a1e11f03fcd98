"""The sampling program on run directories made here: what stdout has, what is held back, what is refused."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm import config as config_lib
from charlstm import distributed
from charlstm import rng as rng_lib
from charlstm.config import Config
from charlstm.inference.generate import Chunk, generate
from charlstm.inference.sampling import Sampling
from charlstm.model import language_model
from charlstm.run import run_directory
from charlstm.run.checkpoint import Checkpoints
from charlstm.training import train_state
from data_pipeline.vocabulary import UNKNOWN, Vocabulary
from launch import sample
from launch.sample import Sample

ROOT = Path(__file__).resolve().parent.parent.parent
BYTES = Vocabulary("bytes")
CONFIG = config_lib.replace(
    config_lib.fill_automatic(Config(), 1),
    num_layers=1,
    hidden_size=8,
    batch_size=8,
    initializer="normal",
    init_scale=1.0,
)
SCORES = {3: 2.5, 5: 2.75}  # step -> bits per character: the best is not the latest


def params_of(step, vocabulary):
    return language_model.init(CONFIG.model, vocabulary.size, rng_lib.named(jax.random.key(step), "init"))


def make_run(run_dir, vocabulary, config=CONFIG):
    identity = run_directory.Identity(vocabulary, "f" * 64)
    run_directory.create(run_dir, config, identity, [])
    with Checkpoints(run_dir / "checkpoints", log=print) as checkpoints:
        for step, score in SCORES.items():
            state = train_state.init(config, vocabulary.size)
            state = state._replace(step=jnp.asarray(step, jnp.int32), params=params_of(step, vocabulary))
            own = run_directory.checkpoint_identity(config, identity)
            checkpoints.save(train_state.place(distributed.make(), state), own, score)
    return run_dir


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bytes") / "run", BYTES)


@pytest.fixture(scope="module")
def characters_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("characters") / "run", Vocabulary("characters", "abcdé€"))


class Stdout(io.TextIOWrapper):
    """A stdout that keeps what it gets, as a file or as a terminal would."""

    def __init__(self, terminal=False, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding)
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def run_for_bytes(monkeypatch):
    """Runs the program in this process: the bytes of its stdout."""

    def run(run_dir, *arguments, **kind):
        with monkeypatch.context() as patched:
            stdout = Stdout(**kind)
            patched.setattr(sys, "stdout", stdout)
            assert sample.main(["sample", f"--run_dir={run_dir}", "--length=60", *arguments]) == 0
            stdout.flush()
            return stdout.buffer.getvalue()

    return run


@pytest.fixture
def run(run_for_bytes):
    """As `run_for_bytes`, what a terminal shows."""
    return lambda *arguments: run_for_bytes(*arguments, terminal=True).decode()


@pytest.fixture(scope="module")
def documents_run(tmp_path_factory):
    """A run that tells documents apart, by "ba"."""
    config = config_lib.replace(CONFIG, reset_state="document", document_separator=r"b\x61")
    return make_run(tmp_path_factory.mktemp("documents") / "run", Vocabulary("characters", "abcdé€"), config)


@contextlib.contextmanager
def process(run_dir, *arguments):
    command = [sys.executable, "-m", "launch.sample", f"--run_dir={run_dir}", *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


# What of a text can be shown.


def grow(ids, chunk, *, vocabulary=BYTES, prompt=b"", stop=b"", **options):
    """The sample of `ids` that arrive `chunk` at a time, and what was shown after each arrival."""
    grown = Sample(vocabulary, np.frombuffer(prompt, np.uint8), np.frombuffer(stop, np.uint8), **options)
    shown = [grown.take()]
    for start in range(0, len(ids), chunk):
        part = np.array(list(ids[start : start + chunk]))
        grown.feed(part, -part.astype(float))
        shown.append(grown.take())
    return grown, [*shown, grown.take(last=True)]


def test_a_text_ends_before_its_stop_string_whatever_chunks_it_comes_in():
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(500):
        text = rng.choice(list(b"ab"), rng.integers(0, 12)).astype(np.uint8).tobytes()
        stop = rng.choice(list(b"ab"), rng.integers(1, 5)).astype(np.uint8).tobytes()
        expected, found, _ = text.partition(stop)
        grown, shown = grow(text, int(rng.integers(1, 5)), stop=stop)
        assert ("".join(shown), bytes(grown.ids), grown.stopped) == (expected.decode(), expected, bool(found))
        assert grown.log_probabilities == [-float(i) for i in expected]
        stopped += grown.stopped
    assert 100 < stopped < 400


def test_a_backward_text_is_shown_when_it_is_whole_with_its_bytes_in_order():
    ids = "né€".encode()[::-1]  # as they are drawn; the text goes on with the prompt, " €"
    grown, shown = grow(ids, 2, prompt=" €".encode()[::-1], backward=True)
    assert shown == ["", "", "", "", "né€ €"] and grown.take(last=True) == ""
    assert grow(b"cba<>x", 1, prompt=b"d", stop=b"<>", backward=True)[1][-1] == "abcd"


def test_only_what_may_be_the_stop_string_is_held_back():
    _, shown = grow(b"xaaby", 1, stop=b"aabb")
    assert shown == ["", "x", "", "", "", "aaby", ""]


def test_a_stop_string_may_begin_in_the_continuation_only():
    grown, _ = grow(b"bab", 1, prompt=b"a", stop=b"ab")
    assert bytes(grown.ids) == b"b"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_a_separator_may_begin_in_the_prompt_but_lie_there_it_may_not(chunk):
    def ended(prompt, text):
        before = np.frombuffer(prompt, np.uint8)
        grown, shown = grow(text, chunk, prompt=prompt, stop=b"abc", before_stop=before)
        assert "".join(shown).encode() == prompt + bytes(grown.ids)
        assert len(grown.log_probabilities) == len(grown.ids)
        return bytes(grown.ids), grown.stopped

    assert ended(b"xa", b"bcd") == ended(b"ab", b"c") == (b"", True)
    assert ended(b"ab", b"abcd") == (b"", True)
    assert ended(b"abc", b"xbc") == (b"xbc", False)
    assert ended(b"a", b"xbabcd") == (b"xb", True)


def test_bytes_that_are_no_utf8_are_kept_where_the_decoder_is_told_so():
    for text in (bytes(range(256)), "é€😀".encode()[:-1], b"\xe2\x82\xe2\x82\xac\xed\xa0\x80"):
        for chunk in (1, 3, 300):
            shown = "".join(grow(text, chunk, prompt=text, errors="surrogateescape")[1])
            assert shown.encode("utf-8", "surrogateescape") == text + text


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_an_incomplete_utf8_sequence_is_held_back(chunk):
    text = "é€😀x"
    _, shown = grow(text.encode(), chunk)
    assert "".join(shown) == text
    assert UNKNOWN not in "".join(shown)
    assert chunk > 1 or shown[1:-1] == ["", "é", "", "", "€", "", "", "", "😀", "x"]


def test_an_unfinished_sequence_is_shown_as_such_at_the_end_and_one_of_the_prompt_is_finished():
    assert grow("x€".encode()[:-1], 1)[1][-1] == UNKNOWN
    assert "".join(grow(b"\xac!", 1, prompt=b"\xe2\x82")[1]) == "€!"


# What is printed.


def test_stdout_is_the_prompt_and_the_very_text_that_the_model_makes(run, bytes_run):
    prompt = "Once \N{EURO SIGN}"
    ids = BYTES.encode(prompt)
    sampling = Sampling(temperature=0.7, top_k=50, top_p=0.9)
    (chunk,) = generate(CONFIG.model, params_of(3, BYTES), ids, sampling, rows=1, length=60, seed=4, chunk=60)
    text = run(bytes_run, f"--prompt={prompt}", "--temperature=0.7", "--top_k=50", "--top_p=0.9", "--seed=4")
    assert text == prompt + BYTES.decode(chunk.ids[0]) + "\n"


def test_the_first_of_several_samples_is_the_only_one_of_one_and_the_others_follow_it(run, bytes_run):
    one, three = (run(bytes_run, "--prompt=Once", f"--num_samples={n}") for n in (1, 3))
    first, second, third = three.replace("\n--- sample 3 of 3 ---\n", "\n--- sample 2 of 3 ---\n").split(
        "\n--- sample 2 of 3 ---\n"
    )
    assert first == one
    assert len({first, second, third}) == 3
    assert all(text.startswith("Once") and text.endswith("\n") for text in (second, third))


def test_the_speed_is_told_of_what_is_made_after_compiling(run, bytes_run, capsys):
    for length, rate in ((200, r", [\d,]+ a second once compiled"), (10, "")):
        run(bytes_run, f"--length={length}")
        assert re.search(rf"^{length} symbols in [\d.]+ s{rate}$", capsys.readouterr().err, re.M)


def test_text_is_flushed_as_it_is_made(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "utf-8"))

    def chunks():
        for word in (b"one ", b"two ", b"three"):
            yield Chunk(np.frombuffer(word, np.uint8)[None], np.zeros((1, len(word))))
            seen.append(terminal.getvalue())

    seen: list[bytes] = []
    nothing = np.zeros(0, np.uint8)
    sample._print_text([Sample(BYTES, np.frombuffer(b"> ", np.uint8), nothing)], chunks())
    assert seen == [b"> one ", b"> one two ", b"> one two three"]
    assert terminal.getvalue() == b"> one two three\n"


def test_json_has_every_symbol_with_its_log_probability(run, bytes_run):
    text = run(bytes_run, "--prompt=Once", "--num_samples=2")
    objects = [
        json.loads(line) for line in run(bytes_run, "--prompt=Once", "--num_samples=2", "--format=json").splitlines()
    ]
    assert text == "\n--- sample 2 of 2 ---\n".join(o["prompt"] + o["text"] + "\n" for o in objects)
    chunks = generate(CONFIG.model, params_of(3, BYTES), BYTES.encode("Once"), Sampling(), rows=2, length=60, seed=0)
    expected = np.concatenate([chunk.log_probabilities for chunk in chunks], axis=1)
    for number, o in enumerate(objects):
        assert bytes(s["symbol"] for s in o["symbols"]).decode("utf-8", "replace") == o["text"]
        np.testing.assert_allclose([s["logprob"] for s in o["symbols"]], expected[number], rtol=1e-5)
        assert o["logprob"] == pytest.approx(expected[number].sum(), rel=1e-5)
        assert o["bits_per_byte"] == pytest.approx(-o["logprob"] / 60 / math.log(2))
        assert "bits_per_character" not in o and o["lossy"] == (UNKNOWN in o["text"])
        assert (o["sample"], o["seed"], o["checkpoint"]) == (number + 1, 0, 3)


def test_json_of_a_vocabulary_of_characters_has_characters_and_never_the_unknown_one(run, characters_run):
    (line,) = run(characters_run, "--prompt=ab", "--format=json", "--temperature=2").splitlines()
    made = json.loads(line)
    assert "".join(s["symbol"] for s in made["symbols"]) == made["text"]
    assert len(made["text"]) == 60
    assert set(made["text"]) == set("abcdé€")
    assert made["bits_per_character"] == pytest.approx(-made["logprob"] / 60 / math.log(2))
    assert "bits_per_byte" not in made and not made["lossy"]


@pytest.mark.parametrize(("which", "step"), [("best", 3), ("latest", 5), ("3", 3), ("5", 5)])
def test_the_checkpoint_asked_for_is_the_one_that_writes(run, bytes_run, which, step):
    made = json.loads(run(bytes_run, "--prompt=Once", "--length=5", "--format=json", f"--checkpoint={which}"))
    expected = generate(
        CONFIG.model, params_of(step, BYTES), BYTES.encode("Once"), Sampling(), rows=1, length=5, seed=0
    )
    assert [s["symbol"] for s in made["symbols"]] == next(expected).ids[0, :5].tolist()
    assert made["checkpoint"] == step


def test_a_sample_ends_before_the_stop_string(run, characters_run):
    whole = run(characters_run, "--prompt=ab")[2:-1]
    stop = whole[20:22]
    assert run(characters_run, "--prompt=ab", f"--stop={stop}") == f"ab{whole.partition(stop)[0]}\n"


def test_a_stop_string_may_have_escapes(run, characters_run):
    whole = run(characters_run, "--prompt=ab")[2:-1]
    assert (
        run(characters_run, "--prompt=ab", r"--stop=\x63\u20ac") == f"ab{whole.partition('c€')[0]}\n" != f"ab{whole}\n"
    )


def test_a_file_or_a_pipe_gets_the_very_bytes_that_the_model_makes_and_a_terminal_valid_text(run_for_bytes, bytes_run):
    ids = np.frombuffer(prompt := b"caf\xe9 ", np.uint8)
    chunks = generate(CONFIG.model, params_of(3, BYTES), ids, Sampling(), rows=3, length=60, seed=0)
    made = [row.tobytes() for row in np.concatenate([chunk.ids for chunk in chunks], axis=1).astype(np.uint8)]
    expected = b"".join(
        (b"" if not n else b"\n--- sample %d of 3 ---\n" % (n + 1)) + prompt + text + b"\n"
        for n, text in enumerate(made)
    )
    arguments = ["--prompt=" + prompt.decode("utf-8", "surrogateescape"), "--num_samples=3"]
    for encoding in ("utf-8", "latin-1", "ascii"):
        assert run_for_bytes(bytes_run, *arguments, encoding=encoding) == expected
    assert run_for_bytes(bytes_run, *arguments, terminal=True).decode() != expected.decode("utf-8", "surrogateescape")
    assert b"\xe9" not in run_for_bytes(bytes_run, *arguments, "--format=json")


def test_a_prompt_from_a_file_is_read_to_its_last_newline(run, bytes_run, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"Once\r\n\xff\n")
    made = json.loads(run(bytes_run, f"--prompt_file={path}", "--length=1", "--format=json"))
    assert made["prompt"] == f"Once\r\n{UNKNOWN}\n"


def test_no_prompt_is_a_newline_that_is_not_shown_and_no_length_is_the_prompt_alone(run, bytes_run):
    assert "\n" + run(bytes_run) == run(bytes_run, "--prompt=\n")
    assert run(bytes_run, "--prompt=Once", "--length=0") == "Once\n"


def test_a_vocabulary_without_newline_begins_anywhere(run, characters_run):
    assert len({run(characters_run, f"--seed={seed}", "--temperature=0") for seed in range(4)}) > 1


def test_an_unknown_symbol_of_the_prompt_is_mapped_when_asked(run, characters_run):
    assert run(characters_run, "--prompt=abx", "--unknown=map").startswith(f"ab{UNKNOWN}")


# Where documents are apart.


def after(text, seed=0):
    """What the model of `documents_run` writes after it has read `text`, and with which log-probabilities."""
    vocabulary = Vocabulary("characters", "abcdé€")
    separator = tuple(vocabulary.encode("ba").tolist())
    options = {"rows": 1, "length": 60, "seed": seed, "unknown_id": 0, "separator": separator}
    chunk = next(generate(CONFIG.model, params_of(3, vocabulary), vocabulary.encode(text), Sampling(), **options))
    return vocabulary.decode(chunk.ids[0]), chunk.log_probabilities[0]


LONG = pytest.mark.long


@pytest.mark.parametrize("prompt", ["", "cdba€", pytest.param("cd", marks=LONG), pytest.param("b", marks=LONG)])
def test_where_documents_are_apart_a_separator_is_read_before_the_prompt(run, documents_run, prompt):
    made = json.loads(run(documents_run, f"--prompt={prompt}", "--stop=", "--format=json"))
    assert (made["prompt"], len(made["text"])) == (prompt, 60)
    logprobs = np.array([symbol["logprob"] for symbol in made["symbols"]])
    # Of what precedes it, only the last symbol of the separator counts, read from the first state: as in training.
    for text in ("ba", "€baba"):
        np.testing.assert_allclose(logprobs, after(text + prompt)[1], rtol=1e-4)
    assert "ba" in prompt or not np.allclose(logprobs[:3], after(prompt or "c")[1][:3], rtol=1e-3)


@pytest.mark.parametrize("prompt", ["cd", "b", pytest.param("", marks=LONG), pytest.param("cdba€", marks=LONG)])
def test_where_documents_are_apart_one_is_written_unless_told_otherwise(run, documents_run, prompt):
    stopped = 0
    seeds = range(4) if prompt != "b" else [next(seed for seed in range(99) if after("bab", seed)[0][0] == "a")]
    for seed in seeds:
        whole, _ = after("ba" + prompt, seed)
        arguments = [f"--prompt={prompt}", f"--seed={seed}"]
        assert run(documents_run, *arguments, "--stop=") == f"{prompt}{whole}\n"
        begun = prompt[-1:]
        document = (begun + whole).partition("ba")[0][len(begun) :]
        for stop in ([], [r"--stop=\x62a"]):
            assert run(documents_run, *arguments, *stop) == f"{prompt}{document}\n"
        stopped += document != whole
    assert stopped


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=abxc"], r"prompt: 'x' \(U\+0078\) at position 2 is not in the vocabulary.*--unknown=map"),
        (["--stop=a\n"], r"stop='a\\n' can never be met: '\\n' \(U\+000A\) at position 1 is not in the vocabulary"),
        ([r"--stop=a\n"], r"stop='a\\\\n' can never be met: '\\n' \(U\+000A\) at position 1 is not in the vocabulary"),
        ([r"--stop=a\q"], r"stop='a\\\\q' can never be met: \\q is not an escape: use \\n"),
        (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file=b are both given"),
        (["--prompt_file=/nowhere/prompt.txt"], "prompt_file=/nowhere/prompt.txt cannot be read: No such file"),
        (["--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--top_p=0"], "top_p=0.0 must be more than 0"),
        (["--length=-1"], "length=-1 must not be negative"),
        (["--num_samples=0"], "num_samples=0 must be at least 1"),
        (
            ["--num_samples=100000000"],
            "num_samples=100000000 must be at most 65536: make the others with another --seed",
        ),
        (["--length=2147483648"], "2147483648 symbols, and at most 2147483647"),
        (["--num_samples=65536", "--length=32768"], "num_samples=65536 of length=32768 are 2147483648 symbols"),
        (["--seed=-1"], "seed=-1 must be from 0 to 4294967295"),
        (["--checkpoint=4"], "4"),
        (["--checkpoint=newest"], "checkpoint='newest' is neither"),
        (["--run_dir=/nowhere"], "run_dir=/nowhere is not a run"),
        (["--run_dir="], "--run_dir is required"),
        (["--temprature=1"], "did you mean temperature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_in_one_sentence(characters_run, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample.main(["sample", f"--run_dir={characters_run}", *arguments])


def test_a_run_without_checkpoints_is_refused(tmp_path):
    run_directory.create(tmp_path / "run", CONFIG, run_directory.Identity(BYTES, "f" * 64), [])
    with pytest.raises(ValueError, match="checkpoint"):
        sample.main(["sample", f"--run_dir={tmp_path / 'run'}"])


# The program as a process.


def test_the_same_seed_makes_the_same_bytes_in_another_process_and_only_those_are_on_stdout(run_for_bytes, bytes_run):
    arguments, prompt = ["--num_samples=2", "--length=60", "--seed=9"], b"caf\xe9 \xc3"
    given = "--prompt=" + os.fsdecode(prompt)
    with process(bytes_run, *arguments, "--prompt_file=-") as other:
        text = other.communicate(prompt)[0]
        assert other.returncode == 0
    assert text == run_for_bytes(bytes_run, *arguments, given) and text.startswith(prompt)


def test_an_interrupt_and_a_closed_pipe_end_the_text_quietly(bytes_run):
    arguments = ["--prompt=Once", "--length=1000000000"]
    with process(bytes_run, *arguments) as interrupted, process(bytes_run, *arguments) as left:
        assert left.stdout.read(100).startswith(b"Once")
        left.stdout.close()
        left.stdout = None
        assert os.read(interrupted.stdout.fileno(), 4) == b"Once"
        interrupted.send_signal(signal.SIGINT)
        (rest, message), (_, complaint) = interrupted.communicate(), left.communicate()
        assert interrupted.returncode == 130
        assert rest.endswith(b"\n")
        assert b"launch.sample: interrupted\n" in message and b"Traceback" not in message
        assert left.returncode == 0
        assert complaint.decode().startswith(f"{bytes_run}: the checkpoint of step 3\n")
        assert b"Traceback" not in complaint
