"""What is read from outside is right, or refused in one line: documents damaged and altered, any text, any prompt.

Each test takes a document that a program wrote, spoils it, and reads it.  What may come back is written down in each
test; what may be raised is ValueError (of a checkpoint also Damaged), whose message is one line, and nothing else.
After each test stand, as examples, the documents of its kind that were once read wrongly or ended in a traceback.

    CHARLSTM_FUZZ=20 .venv/bin/python -m pytest tests/test_fuzzed_borders.py

tries 20 times as many documents, others each time; without it they are the same ones in every run.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from charlstm import config as config_lib
from charlstm import file_manifest
from charlstm.config import Config
from data_pipeline import characters, texts
from data_pipeline.corpora import resolve
from data_pipeline.cutting import cut
from data_pipeline.manifest import NAME, Manifest, read_manifest
from data_pipeline.prepare import main, prepare
from data_pipeline.settings import CorpusSettings
from data_pipeline.shards import open_corpus, verify_corpus
from data_pipeline.vocabulary import UNKNOWN, Vocabulary
from launch import evaluate, flags, run_directory, sample
from launch.job import JobFlags
from launch.sample import Sample, SampleFlags
from launch.train import TrainFlags
from launch.watchdog import WatchdogFlags
from tests.conftest import ROOT

TIMES = int(os.environ.get("CHARLSTM_FUZZ", "1"))


def fuzzed(examples: int = 150):
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def sentence(error: Exception) -> str:
    """What the error says, which is something, in one line."""
    said = str(error)
    assert said.strip() and len(said.splitlines()) == 1, repr(said)
    return said


# Damage: what disks and editors do to bytes, and what hands do to json.

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates, line breaks and NUL too


@st.composite
def damaged(draw, document: bytes, put: st.SearchStrategy[bytes]) -> bytes:
    """`document` with bits flipped and stretches of it lost, doubled, moved or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(document)))
        stop = min(start + draw(st.integers(0, 12)), len(document))
        head, middle, tail = document[:start], document[start:stop], document[stop:]
        what = draw(st.sampled_from(["flip", "replace", "insert", "lose", "double", "move", "cut"]))
        if what == "flip" and tail:
            document = head + middle + bytes([tail[0] ^ 1 << draw(st.integers(0, 7))]) + tail[1:]
        elif what in ("replace", "insert"):
            document = head + draw(put) + (middle if what == "insert" else b"") + tail
        elif what in ("lose", "double"):
            document = head + (2 * middle if what == "double" else b"") + tail
        elif what == "move":
            to = draw(st.integers(0, len(tail)))
            document = head + tail[:to] + middle + tail[to:]
        elif what == "cut":
            document = head
    return document


class Raw(str):
    """Json text that stands in a tree as it is."""


class Object(list):
    """A json object as [key, value] lists: in order, and a key twice if need be."""


class Array(list):
    """A json array as [None, value] lists."""


def tree_of(value: Any) -> Any:
    if isinstance(value, Object):
        return Object([key, tree_of(inner)] for key, inner in value)
    return Array([None, tree_of(inner)] for inner in value) if isinstance(value, list) else value


def written(tree: Any) -> str:
    if isinstance(tree, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, Array):
        return "[" + ",".join(written(value) for _, value in tree) + "]"
    return tree if isinstance(tree, Raw) else json.dumps(tree)


def places(tree: Array | Object) -> Iterator[tuple[Array | Object, int]]:
    """Every place of a value in the tree: what holds it, and the index there."""
    for index, (_, value) in enumerate(tree):
        yield tree, index
        if isinstance(value, Array | Object):
            yield from places(value)


NUMBERS = ["0", "-0", "-1", "1.0", "1e2", "5e-324", "1e999", "-1e999", "NaN", "Infinity", "2147483648"]
NUMBERS += ["18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000]
ANY_JSON = st.one_of(
    st.sampled_from([*NUMBERS, "null", "true", "false", "{}", '"\\ud800"', '"a\\nb"', "[" * 12_000]),
    st.integers(1, 12_000).map(lambda depth: "[" * depth + "]" * depth),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT),
        lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(ANY_TEXT, inside, max_size=3)),
        max_leaves=4,
    ).map(json.dumps),
).map(Raw)


@st.composite
def near(draw, value: Any) -> Any:
    """A value like `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + draw(st.sampled_from([-1, 1, value, -2 * value, 0.5]))
    if isinstance(value, str):
        place = draw(st.integers(0, len(value)))
        return value[:place] + draw(ANY_TEXT) + value[place + draw(st.integers(0, 1)) :]
    return draw(ANY_JSON)


@st.composite
def altered(draw, document: bytes) -> bytes:
    """`document`, which is json, with values replaced, copied, lost, doubled, and keys renamed."""
    whole = tree_of([json.loads(document, object_pairs_hook=Object)])
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(whole))
        if not there:
            break
        (holder, index), (other, other_index) = draw(st.sampled_from(there)), draw(st.sampled_from(there))
        (key, value), (other_key, other_value) = holder[index], other[other_index]
        what = draw(st.sampled_from(["any", "near", "copy", "lose", "double", "key"]))
        if what == "lose":
            del holder[index]
        elif what == "double":
            again = draw(st.one_of(st.just(Raw(written(value))), ANY_JSON))
            holder.insert(draw(st.integers(0, len(holder))), [key, again])
        elif what == "key":
            holder[index] = [draw(st.one_of(st.just(other_key or ""), ANY_TEXT)), value]
        elif what == "copy":
            holder[index] = [key, Raw(written(other_value))]
        else:
            holder[index] = [key, draw(near(value) if what == "near" else ANY_JSON)]
    return "".join(written(value) for _, value in whole).encode()


def spoiled(document: bytes) -> st.SearchStrategy[bytes]:
    """A json document, damaged or altered."""
    put = st.one_of(st.binary(max_size=4), ANY_JSON.map(str.encode))
    return st.one_of(altered(document), damaged(document, put))


TOO_DEEP = "[" * 100_000


def replaced(document: bytes, old: str, new: str) -> bytes:
    """`document` with the first `old` in it replaced; all of it, where `old` is empty."""
    assert old.encode() in document
    return document.replace(old.encode(), new.encode(), 1) if old else new.encode()


@contextlib.contextmanager
def standing(path: Path, document: bytes) -> Iterator[None]:
    """`path` with another content, for a while."""
    before = path.read_bytes()
    path.write_bytes(document)
    try:
        yield
    finally:
        path.write_bytes(before)


# A prepared corpus.

POEM = "Ein Grün, ein Blau — 漢字 🙂\n" * 8


@pytest.fixture(scope="module", params=["bytes", "characters"])
def corpus(request, tmp_path_factory) -> Path:
    """Three splits, of several shards of one size, so that one could be taken for another.  Its manifest is spoiled."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(POEM, "utf-8")
    chosen = CorpusSettings(
        str(folder / "text.txt"), request.param, cache_dir=str(folder), valid_fraction=0.3, test_fraction=0.3
    )
    return prepare(chosen, folder / "corpus", shard_bytes=16, block_bytes=8)


def contents(directory: Path) -> tuple[Manifest, dict[str, list[int]]]:
    """All that a prepared corpus says; the bytes of a split, which bits per byte are made with, are in the manifest."""
    splits = open_corpus(directory).splits
    return read_manifest(directory), {name: split.read(0, len(split)).tolist() for name, split in splits.items()}


@fuzzed()
@given(st.data())
def test_a_manifest_is_read_as_it_was_written_or_refused(corpus, data):
    whole, document = contents(corpus), data.draw(spoiled((corpus / NAME).read_bytes()))
    with standing(corpus / NAME, document):
        try:
            assert contents(corpus) == whole
        except ValueError as error:
            assert str(corpus / NAME) in sentence(error)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", TOO_DEEP),
        ("", "1" * 5000),
        ('"bytes": 1', '"bytes": 2'),  # bits per byte would be another figure
        ('"key": "', '"key": "0'),
        ("text.txt", "next.txt"),
        ('"block_bytes": 8', '"block_bytes": 1000000'),
        ("train-00000.ids", "train-00001.ids"),  # of the same size: another text
        ('"format_version": 2', '"format_version": "a\\nb"'),
        ('"dtype": "', '"dtype": "\\n'),
        ('"kind"', '"a\\nb"'),
    ],
    ids=range(10),
)
def test_a_manifest_of_these_is_refused(corpus, old, new):
    path = corpus / NAME
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(ValueError) as caught:
        contents(corpus)
    assert str(path) in sentence(caught.value)


@fuzzed(80)
@given(st.data())
def test_shards_and_their_checksums_are_read_as_they_were_written_or_refused(corpus, data):
    path = data.draw(st.sampled_from(sorted(set(corpus.iterdir()) - {corpus / NAME})))
    whole, document = contents(corpus), data.draw(damaged(path.read_bytes(), st.binary(max_size=4)))
    with standing(path, document):
        try:
            assert contents(corpus) == whole
        except ValueError as error:
            assert path.stem in sentence(error)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[CorpusSettings, Path, dict[Path, bytes], Any]:
    """A preparation stopped when all shards were written, its folder, what it left there, and what comes of it."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "text.txt").write_text(POEM, "utf-8")
    chosen = CorpusSettings(str(folder / "text.txt"), "characters", cache_dir=str(folder))

    def stop(doing: str, done: int, total: int) -> None:
        if (doing, done) == ("writing", total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(chosen, folder / "out", stop, workers=1, shard_bytes=64, block_bytes=16)
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / "text.txt"]
    left = {path: path.read_bytes() for path in paths}
    straight = contents(prepare(chosen, folder / "straight", shard_bytes=64, block_bytes=16))
    return chosen, folder, left, straight


@fuzzed(80)
@given(st.data())
def test_what_a_stopped_preparation_has_left_is_used_as_it_was_written_or_made_again(stopped, data):
    chosen, folder, left, straight = stopped
    path = data.draw(st.sampled_from(sorted(left)))
    spoil = {path: data.draw(damaged(left[path], st.binary(max_size=4)))}
    try:
        assert gone_on(chosen, folder, left | spoil) == straight
    except ValueError as error:  # a shard that is no longer what it was: found when it is read
        assert path.suffix in (".ids", ".crc") and path.stem in sentence(error)


def gone_on(chosen: CorpusSettings, folder: Path, left: dict[Path, bytes]) -> Any:
    """The contents of what is made where `left` was left."""
    for path, document in left.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document)
    try:
        return contents(prepare(chosen, folder / "out", workers=1, shard_bytes=64, block_bytes=16))
    finally:
        shutil.rmtree(folder / "out")


@pytest.mark.parametrize("pattern", ["memo/*.json", ".out.partial/*.ids.json", ".out.partial/key"])
def test_what_a_stopped_preparation_has_left_of_these_is_made_again(stopped, pattern):
    chosen, folder, left, straight = stopped
    path = next(path for path in left if path.match(pattern))
    digit = left[path].index(b'"sha256":"') + 12 if b'"sha256"' in left[path] else 8
    other = bytes([left[path][digit] ^ 1])  # a digest of the same form, and wrong
    for document in (b"", b"\xff", left[path][:digit] + other + left[path][digit + 1 :]):
        assert gone_on(chosen, folder, left | {path: document}) == straight


# A run directory: config.json and identity.json.

CONFIG = config_lib.resolve(Config(), 8)
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
            run_directory.require_own(sealed, CONFIG, found, run_dir)
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
        run_directory.require_own(run_directory.checkpoint_identity(CONFIG, own), CONFIG, other, run_dir)


NEARLY_ALL = Vocabulary("characters", "".join(map(chr, range(0xD800))))


@pytest.mark.filterwarnings("ignore:decoding with 'unicode_escape'", "ignore:invalid escape sequence")
@example("\\x")
@fuzzed()
@given(st.one_of(ANY_TEXT, st.text(r"\xunN{}07aé漢", max_size=6)))
def test_a_document_separator_is_one_symbol_or_refused(text):
    config = config_lib.replace(CONFIG, reset_state="document", document_separator=text)
    try:
        separator = run_directory.separator(config, NEARLY_ALL)
    except ValueError as error:
        assert "document_separator" in sentence(error)
    else:
        assert len(text) == 1 or "\\" in text
        assert len(text) > 1 or NEARLY_ALL.decode(np.array([separator])) == text


# The seal of a checkpoint.


@pytest.fixture(scope="module")
def step_directory(tmp_path_factory) -> file_manifest.StepDirectory:
    """One checkpoint, of step 7.  Its seal is spoiled."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "7" / "params").mkdir(parents=True)
    (folder / "7" / "params" / "data").write_bytes(bytes(range(256)))
    meta = {
        "format": file_manifest.FORMAT,
        "step": 7,
        "identity": run_directory.checkpoint_identity(CONFIG, IDENTITIES[1]),
        "bits_per_character": 1.25,
        "arrays": {"params.w": {"dtype": "float32", "shape": [16, 4], "digest": "0123456789abcdef"}},
    }
    file_manifest.seal(folder / "7", meta)
    return file_manifest.StepDirectory(folder)


@fuzzed()
@given(st.data())
def test_a_seal_says_what_was_sealed_or_is_damage(step_directory, data):
    path = step_directory.step(7) / file_manifest.SEAL
    meta = step_directory.read(7)
    with standing(path, data.draw(spoiled(path.read_bytes()))):
        try:
            found = [step_directory.read(7), step_directory.read(7, ["params"])]
        except file_manifest.Damaged as error:
            assert file_manifest.SEAL in sentence(error) and not step_directory.sealed()
        else:
            assert {json.dumps(each) for each in found} == {json.dumps(meta)}


@pytest.mark.parametrize(("old", "new"), [("", TOO_DEEP), ('"shape": [', f'"shape": [{"[" * 400}{"]" * 400},')])
def test_a_seal_of_these_is_damage(step_directory, old, new):
    path = step_directory.step(7) / file_manifest.SEAL
    with standing(path, replaced(path.read_bytes(), old, new)), pytest.raises(file_manifest.Damaged) as caught:
        step_directory.read(7)
    assert file_manifest.SEAL in sentence(caught.value)


# A flagfile.

GROUPS = TrainFlags(), Config(), JobFlags(), WatchdogFlags()
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
        "--dropout=nan",
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
@fuzzed(300)
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


@fuzzed(300)
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


# A text.

ANY_FILE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(str.encode),
    st.text(min_size=1, max_size=30).flatmap(lambda text: damaged(text.encode(), st.binary(min_size=1, max_size=4))),
)


@fuzzed()
@given(
    st.dictionaries(st.sampled_from(["a", "b.txt", "c/d", "not UTF-8 \udcff"]), ANY_FILE, min_size=1),
    st.sampled_from(["bytes", "characters"]),
    st.sampled_from([(0.0, 0.0, "contiguous"), (0.2, 0.1, "contiguous"), (0.0, 0.3, "columns:2x3")]),
    st.sampled_from([(1, 5), (3, 16), (1 << 20, 16 << 20)]),
)
def test_a_text_is_prepared_as_it_is_or_refused_naming_file_and_byte(files, kind, how, pieces):
    valid, test, split = how
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "CHUNK", pieces[0])
        patch.setattr(characters, "REGION", pieces[1])
        for name, content in files.items():
            (Path(folder) / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "in" / name).write_bytes(content)
        chosen = CorpusSettings(
            str(Path(folder) / "in"), kind, valid_fraction=valid, test_fraction=test, split=split, cache_dir=folder
        )
        try:
            directory = prepare(chosen, Path(folder) / "out", workers=2, shard_bytes=8, block_bytes=4)
        except ValueError as error:
            said, directory = sentence(error), None
        else:
            verify_corpus(directory)
            corpus = open_corpus(directory)
            decode = corpus.vocabulary.decode_bytes
            shown = {name: decode(part.read(0, len(part))) for name, part in corpus.splits.items()}
            sizes = {name: part.bytes for name, part in corpus.splits.items()}
        assert directory or not list(Path(folder).glob("*out*"))
    text: bytes | str = b"".join(content for _, content in sorted(files.items()))
    if not text:
        assert "is empty" in said
        return
    if kind == "characters":
        for name, content in sorted(files.items()):
            try:
                content.decode()
            except UnicodeDecodeError as error:
                assert f"{name} is not UTF-8 text: bad sequence at byte {error.start};" in said
                return
        text = text.decode()
    try:
        spans = cut(len(text), chosen)
    except ValueError as error:
        assert said == str(error)
        return
    parts = {name: text[:0].join(text[start:stop] for start, stop in part) for name, part in spans.items()}
    if isinstance(text, str):
        assert sizes == {name: len(part.encode()) for name, part in parts.items()}
        known = set(parts["train"])
        parts = {name: "".join(c if c in known else UNKNOWN for c in part).encode() for name, part in parts.items()}
    assert shown == parts


def test_a_file_whose_name_has_a_line_break_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\nb").write_bytes(b"\xff")
    options = f"--input={tmp_path}/in", f"--output={tmp_path}/out", f"--cache_dir={tmp_path}", "--vocabulary=characters"
    with pytest.raises(SystemExit) as left:
        main([*options])
    said = capfd.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "a b is not UTF-8 text: bad sequence at byte 0" in said
