"""What is read from outside is right, or refused in one line: a run's documents, a flagfile, a prompt.

Each test takes a document that a program wrote, spoils it (`fuzzing`), and reads it.  What may come back is written
down in each test; what may be raised is ValueError (of a checkpoint also Damaged), whose message is one line, and
nothing else.  After each test stand, as examples, the documents of its kind that were once read wrongly or ended in a
traceback.  The documents of a corpus are in data_pipeline/test_fuzzed_corpora.py.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from charlstm import config as config_lib
from charlstm.config import Config
from charlstm.run import run_directory, sealing
from charlstm.run import step_directory as step_directory_lib
from data_pipeline.build.corpora import resolve
from data_pipeline.build.prepare import prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.vocabulary import UNKNOWN, Vocabulary
from launch import evaluate, sample
from launch.sample import Sample, SampleFlags
from launch.support import flags
from launch.support.cluster import JobFlags
from launch.support.prometheus import MonitorFlags
from launch.support.train_flags import TrainFlags
from launch.support.watchdog import WatchdogFlags
from tests.conftest import ROOT
from tests.fuzzing import ANY_TEXT, TOO_DEEP, damaged, fuzzed, replaced, sentence, spoiled, standing

# A run directory: config.json and identity.json.

CONFIG = config_lib.fill_automatic(Config(), 8)
IDENTITIES = [
    run_directory.Identity(Vocabulary("bytes"), "0123456789abcdef" * 4),
    run_directory.Identity(Vocabulary("characters", "\n abßλ漢🙂"), "fedcba9876543210" * 4),
]


@pytest.fixture(scope="module", params=IDENTITIES, ids=["bytes", "characters"])
def run_dir(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_directory.create(folder, CONFIG, request.param, ["--run_dir=here"])
    return folder


@fuzzed()
@given(st.data())
def test_a_config_json_is_a_config_that_is_written_as_it_was_read_or_refused(run_dir, data):
    path = run_dir / "config.json"
    with standing(path, data.draw(spoiled(path.read_bytes()))):
        try:
            config, _ = run_directory.read(run_dir)
        except ValueError as error:
            assert str(run_dir) in sentence(error)
        else:
            assert repr(config_lib.from_json(config_lib.to_json(config), "here")) == repr(config)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"window": 128', '"window": 4294967296'),
        ('"reader_threads"', '"a\\nb"'),
    ],
    ids=range(2),
)
def test_a_config_json_of_these_is_refused(run_dir, old, new):
    path = run_dir / "config.json"
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(ValueError) as caught:
        run_directory.read(run_dir)
    assert str(path) in sentence(caught.value)


@fuzzed()
@given(st.data())
def test_an_identity_json_is_read_as_it_was_written_or_refused_by_itself_or_by_the_checkpoints(run_dir, data):
    path = run_dir / "identity.json"
    _, identity = run_directory.read(run_dir)
    sealed = run_directory.checkpoint_identity(CONFIG, identity)
    with standing(path, data.draw(spoiled(path.read_bytes()))):
        try:
            _, found = run_directory.read(run_dir)
            run_directory.check_checkpoint(sealed, CONFIG, found, run_dir)
        except ValueError as error:
            assert str(run_dir) in sentence(error)
        else:
            assert found == identity


@pytest.mark.parametrize(
    ("old", "new"),
    [("", TOO_DEEP), ('"corpus_fingerprint": "', '"corpus_fingerprint": "\\n'), ('"kind"', '"a\\nb"')],
    ids=range(3),
)
def test_an_identity_json_of_these_is_refused(run_dir, old, new):
    path = run_dir / "identity.json"
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(ValueError) as caught:
        run_directory.read(run_dir)
    assert f"{path} is damaged: " in sentence(caught.value)


def test_an_identity_json_with_another_vocabulary_is_refused_by_the_checkpoints(run_dir):
    _, own = run_directory.read(run_dir)
    other = run_directory.Identity(Vocabulary("characters", "ab"), own.corpus_fingerprint)
    with pytest.raises(ValueError, match="vocabulary_digest"):
        run_directory.check_checkpoint(run_directory.checkpoint_identity(CONFIG, own), CONFIG, other, run_dir)


NEARLY_ALL = Vocabulary("characters", "".join(map(chr, range(0xD800))))


@example("\\x")
@fuzzed()
@given(st.one_of(ANY_TEXT, st.text(r"\xunN{}07aé漢", max_size=6)))
def test_a_document_separator_is_symbols_or_refused(text):
    config = config_lib.replace(CONFIG, reset_state="document", document_separator=text)
    try:
        separator = run_directory.separator(config, NEARLY_ALL)
    except ValueError as error:
        assert "document_separator" in sentence(error)
    else:
        assert separator and ("\\" in text or NEARLY_ALL.decode(np.array(separator)) == text)


# The seal of a checkpoint.


@pytest.fixture(scope="module")
def step_directory(tmp_path_factory) -> step_directory_lib.StepDirectory:
    """One checkpoint, of step 7.  Its seal is spoiled."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "7" / "params").mkdir(parents=True)
    (folder / "7" / "params" / "data").write_bytes(bytes(range(256)))
    meta = {
        "format": step_directory_lib.FORMAT,
        "step": 7,
        "identity": run_directory.checkpoint_identity(CONFIG, IDENTITIES[1]),
        "bits_per_symbol": 1.25,
        "sums": {"nats": 0.1, "symbols": 20, "steps": 1},
        "arrays": {"params.w": {"dtype": "float32", "shape": [16, 4], "digest": "0123456789abcdef"}},
    }
    sealing.seal(folder / "7", meta)
    return step_directory_lib.StepDirectory(folder)


@fuzzed()
@given(st.data())
def test_a_seal_says_what_was_sealed_or_is_damage(step_directory, data):
    path = step_directory.step(7) / sealing.SEAL
    meta = step_directory.read(7)
    with standing(path, data.draw(spoiled(path.read_bytes()))):
        try:
            found = [step_directory.read(7), step_directory.read(7, ["params"])]
        except sealing.Damaged as error:
            assert sealing.SEAL in sentence(error) and not step_directory.sealed()
        else:
            assert {json.dumps(each) for each in found} == {json.dumps(meta)}


@pytest.mark.parametrize(("old", "new"), [("", TOO_DEEP), ('"shape": [', f'"shape": [{"[" * 400}{"]" * 400},')])
def test_a_seal_of_these_is_damage(step_directory, old, new):
    path = step_directory.step(7) / sealing.SEAL
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(sealing.Damaged) as caught:
        step_directory.read(7)
    assert sealing.SEAL in sentence(caught.value)


# A flagfile.

GROUPS = TrainFlags(), Config(), JobFlags(), WatchdogFlags(), MonitorFlags()
FLAGFILES = [path.read_text() for path in sorted((ROOT / "configs").glob("*.flags"))]
STRANGE = [
    "-skip",
    "--seed=1_0",
    '--corpus=" a "',
    '--corpus="a\\nb"',
    '--corpus="\\ud800"',
    "--corpus=",
    "--corpus===",
]
WRONG = [
    *("--", "-", "--=3", "word", "--help", "--a\u2028b=1", "--a\fb", "--hiden_size=3", "--undefok=hiden_size"),
    *("--corpus", "--seed", "--nocorpus", "--noskip=true", '--noskip="a\\nb"', '--cell="a\\nb"', '--corpus="'),
    *(
        "--input_dropout=nan",
        "--init_scale=1e999",
        "--flagfile=~no-such-user/x",
        '--flagfile="a\\nb"',
        '--flagfile="\\u0000"',
    ),
    *("--flagfile", "--flagfile="),
]


@st.composite
def spoiled_flags(draw) -> bytes:
    lines = [line for line in draw(st.sampled_from(FLAGFILES)).split("\n") if not line.startswith("#")]
    any_corpus = ANY_TEXT.map(lambda text: f"--corpus={json.dumps(text)}")
    for _ in range(draw(st.integers(0, 2))):
        line = draw(st.one_of(st.sampled_from(STRANGE), any_corpus, st.sampled_from(WRONG)))
        lines.insert(draw(st.integers(0, len(lines))), line)
    document = "\n".join(lines).encode()
    put = st.one_of(st.binary(max_size=4), ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
    return draw(damaged(document, put)) if draw(st.booleans()) else document


def line_by_line(document: bytes) -> dict[str, str | None]:
    """Flag -> what its last line says, None where that is no more than its name."""
    said: dict[str, str | None] = {}
    for line in map(str.strip, document.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        if line.startswith("-"):
            name, equals, value = line.removeprefix("-").removeprefix("-").partition("=")
            said[name] = (json.loads(value) if value.startswith('"') else value) if equals else None
    return said


@example(b"--", [])  # would end the flags
@example(b"--seed=3\n--corpus", ["--log_every=77"])  # would take the next argument for its value
@example(b"--corpus\n--seed=3", [])
@example(b"--undefok=hiden_size\n--hiden_size=3", [])
@example(b"--flagfile=~no-such-user/x", [])
@example(b'--noskip="a\\nb"', [])
@example("--a\u2028b=1".encode(), [])
@fuzzed(80)
@given(spoiled_flags(), st.sampled_from([[], ["--log_every=77"]]))
def test_a_flagfile_means_what_its_lines_say_each_by_itself_or_is_refused(tmp_path_factory, document, after):
    path, again = (tmp_path_factory.getbasetemp() / name for name in ("spoiled.flags", "again.flags"))
    path.write_bytes(document)
    try:
        groups, given_ = flags.parse(["train", f"--flagfile={path}", *after], "", *GROUPS)
    except ValueError as error:
        sentence(error)
        return
    again.write_text("\n".join(given_) + "\n", "utf-8")
    assert repr(flags.parse(["train", f"--flagfile={again}"], "", *GROUPS)) == repr((groups, given_))
    leaves = [leaf for group in groups for leaf in flags._leaves(group)]
    values = {field.name: getattr(leaf, field.name) for leaf in leaves for field in dataclasses.fields(leaf)}
    assert not after or values["log_every"] == 77  # the command line comes last, whatever the flagfile ends with
    for name, text in line_by_line(document).items():
        if name not in values:
            assert name[:2] == "no" and isinstance(values[name[2:]], bool) and text is None
        elif text is None:
            assert isinstance(values[name], bool)
        elif isinstance(values[name], str):
            assert values[name] == text


def test_a_home_that_is_not_there_is_refused_wherever_a_path_is_named():
    for refuse in (
        lambda path: flags.parse(["train", f"--flagfile={path}"], "", Config()),
        lambda path: sample._prompt(SampleFlags(prompt_file=path), Vocabulary("bytes")),
        lambda path: sample.main(["sample", f"--run_dir={path}"]),
        lambda path: evaluate.main(["evaluate", f"--run_dir={path}"]),
        lambda path: resolve(CorpusSettings(corpus=path)),
        lambda path: prepare(CorpusSettings(train=path)),
        lambda path: prepare(CorpusSettings(cache_dir=path)),
    ):
        with pytest.raises(ValueError, match=r"^~no-such-user/here begins with the home directory of"):
            refuse("~no-such-user/here")


# A prompt.

VOCABULARIES = st.one_of(
    st.just(Vocabulary("bytes")),
    st.sets(st.characters(), min_size=1).map(lambda found: Vocabulary("characters", "".join(sorted(found)))),
)


@fuzzed(80)
@given(VOCABULARIES, ANY_TEXT, st.sampled_from(["refuse", "map"]))
def test_a_prompt_is_the_ids_that_decode_to_it_or_refused(vocabulary, text, unknown):
    (chosen,), _ = flags.parse(["sample", f"--prompt={text}", f"--unknown={unknown}"], "", SampleFlags())
    assert chosen.prompt == text
    strange = {symbol for symbol in text if "\ud800" <= symbol <= "\udfff" and not "\udc80" <= symbol <= "\udcff"}
    if vocabulary.kind == "characters":
        strange = set(text) - set(vocabulary.characters) if unknown == "refuse" else set()
    try:
        ids = sample._prompt(chosen, vocabulary)
    except ValueError as error:
        first = next(k for k, symbol in enumerate(text) if symbol in strange)
        assert f"U+{ord(text[first]):04X}) at position {first} " in sentence(error)
        return
    assert not strange
    if vocabulary.kind == "bytes":
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        assert vocabulary.decode_bytes(ids) == text.encode("utf-8", "surrogateescape")
    else:
        shown = "".join(symbol if symbol in vocabulary.characters else UNKNOWN for symbol in text)
    assert vocabulary.decode(ids) == Sample(vocabulary, ids, ids[:0]).take(last=True) == shown


@fuzzed()
@given(VOCABULARIES, st.one_of(st.binary(max_size=20), st.text(max_size=8).map(str.encode)))
def test_a_prompt_file_is_the_ids_that_decode_to_its_bytes_or_refused(tmp_path_factory, vocabulary, content):
    path = tmp_path_factory.getbasetemp() / "prompt.txt"
    path.write_bytes(content)
    try:
        ids = sample._prompt(SampleFlags(prompt_file=str(path)), vocabulary)
    except ValueError as error:
        assert vocabulary.kind == "characters" and " at position " in sentence(error)
        assert set(content.decode("utf-8", "surrogateescape")) - set(vocabulary.characters)
    else:
        assert vocabulary.decode_bytes(ids) == content
