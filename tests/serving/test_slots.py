"""Texts of the slots beside those of `generate`, whatever else is written at the time."""

import base64
import contextlib
import functools
import struct
import threading
import zlib

import jax
import numpy as np
import pytest

from charlstm import distributed
from charlstm.inference.generate import generate
from charlstm.inference.sampling import Sampling
from charlstm.serving import opaque
from charlstm.serving.slots import CHUNK, Broken, Full, OtherModel, Slots
from charlstm.serving.texts import Group, Loaded, Prompt, Text
from data_pipeline.vocabulary import Vocabulary
from tests.serving.conftest import CONFIG, params_of

VOCABULARY = Vocabulary("characters", "\nabcdefghij")
SETTINGS = [Sampling(), Sampling(0), Sampling(0.6), Sampling(top_k=3), Sampling(1.2, 0, 0.7), Sampling(0.9, 5, 0.9)]


@functools.cache
def loaded(step=3, devices=1, separator=()):
    mesh = distributed.make(jax.devices()[:devices])
    params = distributed.put(mesh, distributed.REPLICATED, params_of(step, VOCABULARY))
    return Loaded(CONFIG.model, params, VOCABULARY, separator, 0, step, bytes([step]) * 16)


class Written(Text):
    """A text that is kept, with all that can be asked for."""

    def __init__(self, ids, sampling=SETTINGS[0], seed=0, number=0, length=40, prompt=None, group=None):
        prompt = prompt or Prompt(group or Group(), np.asarray(ids, np.int32))
        super().__init__(prompt, sampling, seed, number, length)
        self.ids, self.log_probabilities, self.trail, self.logits = [], [], [], []
        self.done, self.error = threading.Event(), None

    def begin(self, beginning):
        self.trail.append(beginning)
        if not self.length:
            self.done.set()

    def feed(self, symbols):
        self.ids += symbols.ids.tolist()
        self.log_probabilities += symbols.log_probabilities.tolist()
        self.trail += symbols.beginnings()
        self.logits += list(symbols.logits())
        if len(self.ids) >= self.length:
            self.done.set()
            return True
        return False

    def fail(self, error):
        self.error = error
        self.done.set()


def expected(model, text):
    """What `generate` makes: ids and log-probabilities."""
    chunks = list(
        generate(
            model.config,
            model.params,
            text.prompt.ids,
            text.sampling,
            rows=text.number + 1,
            length=text.length,
            seed=text.seed,
            unknown_id=model.unknown_id,
            separator=model.separator,
        )
    )
    return tuple(np.concatenate([chunk[i] for chunk in chunks], axis=1)[text.number].tolist() for i in (0, 1))


@pytest.fixture
def slots(request):
    rows, queue, *how = request.param
    running = Slots(loaded(**dict(how)), rows, queue)
    yield running
    running.close()


def wait(texts):
    for text in texts:
        assert text.done.wait(300) and text.error is None, text.error


@pytest.mark.parametrize(
    "slots",
    [pytest.param((5, 99), marks=pytest.mark.long), (7, 99, ("devices", 2), ("separator", (3, 4)))],
    indirect=True,
    ids=["1", "2 documents"],
)
def test_texts_have_the_bits_of_generate_whatever_else_is_written(slots):
    """Of prompts, settings, seeds and lengths that all differ; more of them than slots, so they join and leave."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(23):
        ids = rng.integers(0, len(VOCABULARY.characters), rng.choice([0, 1, 2, 40, 200]))
        how = {"seed": int(rng.integers(4)), "number": number % 3, "length": int(rng.integers(1, 60))}
        texts.append(Written(ids, SETTINGS[number % len(SETTINGS)], **how))
    slots.submit(texts)
    wait(texts)
    for text in texts:
        ids, log_probabilities = expected(slots.model, text)
        assert text.ids == ids
        assert text.log_probabilities == log_probabilities
        chosen = [jax.nn.log_softmax(row)[i] for row, i in zip(text.logits, text.ids, strict=True)]
        np.testing.assert_allclose(chosen, text.log_probabilities, rtol=1e-4, atol=1e-5)
    assert slots.busy == slots.waiting == 0


@pytest.mark.parametrize("slots", [(7, 9, ("devices", 2))], indirect=True)
def test_the_first_text_that_is_wanted_waits_for_no_compilation_of_the_model(slots, caplog):
    assert (slots.written, slots.read, slots.busy) == (0, 0, 0)
    jax.config.update("jax_log_compiles", True)  # of all threads
    try:
        for text in (Written([1, 2, 3], length=2 * CHUNK + 1), Written([5], SETTINGS[4], length=1)):
            slots.submit([text])
            wait([text])
    finally:
        jax.config.update("jax_log_compiles", False)
    assert "Compiling" in caplog.text, "small programs, such as that of a state's slice"
    assert "Compiling jit(make_chunk)" not in caplog.text and "Compiling jit(_read_window)" not in caplog.text


@pytest.mark.parametrize("slots", [(4, 99, ("separator", (3, 4)))], indirect=True)
def test_a_text_goes_on_from_its_state_as_if_it_had_not_been_interrupted(slots):
    whole = Written([1, 2, 3, 4, 5], SETTINGS[4], length=50, number=1)
    slots.submit([whole])
    wait([whole])
    for cut in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 49):
        text = opaque.pack(slots.model, whole.trail[cut], opaque.Joint(cut, 1))
        beginning, joint = opaque.unpack(slots.model, text)
        assert joint == (cut, 1, b"")
        rest = Written(
            [], SETTINGS[4], length=50 - cut, number=1, prompt=Prompt(Group(), np.zeros(0, int), beginning, cut)
        )
        slots.submit([rest])
        wait([rest])
        assert (rest.ids, rest.log_probabilities) == (whole.ids[cut:], whole.log_probabilities[cut:])


@pytest.mark.parametrize("slots", [(4, 99)], indirect=True)
def test_what_is_read_from_a_state_is_read_after_what_led_to_it(slots):
    ids = np.arange(300) % 9 + 1
    first = Written(ids[:100], length=0)
    slots.submit([first])
    wait([first])
    second = Written([], GREEDY, length=30, prompt=Prompt(Group(), ids[100:].astype(np.int32), first.trail[0]))
    whole = Written(ids, GREEDY, length=30)
    slots.submit([second, whole])
    wait([second, whole])
    assert second.ids == whole.ids
    np.testing.assert_allclose(second.log_probabilities, whole.log_probabilities, rtol=1e-4, atol=1e-5)


GREEDY = Sampling(0)


@pytest.mark.parametrize("slots", [(2, 3)], indirect=True)
def test_more_texts_than_may_wait_are_refused_and_those_that_are_left_make_room(slots):
    with pytest.raises(Full):
        slots.submit([Written([1]) for _ in range(slots.capacity + 1)])
    assert slots.busy == slots.waiting == 0
    endless = [Written([1], length=10**9) for _ in range(slots.capacity)]
    slots.submit(endless)
    with pytest.raises(Full):
        slots.submit([Written([1])])
    slots.leave(endless)
    for _ in range(1000):
        try:
            slots.submit([last := Written([1])])
            break
        except Full:
            threading.Event().wait(0.01)
    wait([last])
    assert last.ids == expected(slots.model, last)[0]
    assert slots.busy == slots.waiting == 0


@pytest.mark.parametrize("slots", [(2, 99)], indirect=True)
def test_a_new_model_writes_from_the_next_request_on(slots):
    old, new, group = slots.model, loaded(step=5), Group()
    begun = threading.Event()
    texts = [Written([1, 2], length=400, number=number, group=group) for number in range(4)]
    texts[0].begin = lambda beginning: begun.set()
    slots.submit(texts)
    assert begun.wait(300)
    slots.use(new)
    later = Written([1, 2], length=40)
    of_old_state = Written([1, 2], group=Group(old.digest))
    slots.submit([later, of_old_state])
    wait([*texts, later])
    assert of_old_state.done.wait(300) and isinstance(of_old_state.error, OtherModel)
    assert [text.ids for text in texts] == [expected(old, text)[0] for text in texts]
    assert later.ids == expected(new, later)[0] != expected(old, later)[0]
    assert (later.prompt.group.model.step, group.model.step) == (5, 3)


@pytest.mark.parametrize("slots", [(2, 99)], indirect=True)
def test_a_failure_of_the_device_fails_the_texts_and_the_next_are_written(slots, monkeypatch):
    texts = [Written([1], length=10**9) for _ in range(3)]

    def fail(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("charlstm.serving.slots.Fetched", fail)
        slots.submit(texts)
        for text in texts:
            assert text.done.wait(300) and "out of memory" in str(text.error)
    again = Written([1])
    slots.submit([again])
    wait([again])
    assert again.ids == expected(slots.model, again)[0]


@pytest.mark.parametrize("slots", [(2, 99)], indirect=True)
@pytest.mark.parametrize("place", ["slots.make_chunk", "slots.first_symbols", "slots.Slots._admit"])
def test_a_device_that_fails_for_good_fails_the_texts_and_no_more_are_taken(slots, place, monkeypatch):
    def fail(*args):
        raise RuntimeError("an illegal memory access")

    texts = [Written([], number=number) for number in range(3)]
    monkeypatch.setattr(f"charlstm.serving.{place}", fail)
    monkeypatch.setattr("charlstm.model.language_model.zero_state", fail)
    slots.submit(texts)
    for text in texts:
        assert text.done.wait(30) and "illegal" in str(text.error)
    assert slots.is_broken and slots.busy == slots.waiting == 0
    with pytest.raises(Broken):
        slots.submit([Written([1])])


def whole_state(model):
    texts = [Written([1, 2, 3], length=20)]
    slots = Slots(model, 2, 9)
    try:
        slots.submit(texts)
        wait(texts)
    finally:
        slots.close()
    return opaque.pack(model, texts[0].trail[-1], opaque.Joint(20))


def test_a_state_that_is_none_is_refused_in_a_sentence():
    model = loaded()
    state = whole_state(model)
    raw = base64.b64decode(state)
    opaque.unpack(model, state)

    def sealed(content):
        return base64.b64encode(content + struct.pack("<I", zlib.crc32(content))).decode()

    assert sealed(raw[:-4]) == state
    nan = raw[:-8] + struct.pack("<f", float("nan"))
    bytes_model = model._replace(vocabulary=Vocabulary("bytes"))
    for pending, is_one in (
        (b"", True),
        (b"\xe2\x82", True),
        (b"a", False),
        (b"\xe2\x82\xac", False),
        (b"\x82", False),
    ):
        packed = opaque.pack(bytes_model, opaque.unpack(model, state)[0], opaque.Joint(20, 0, pending))
        with contextlib.nullcontext() if is_one else pytest.raises(ValueError, match="no text leads to"):
            assert opaque.unpack(bytes_model, packed)[1].pending == pending
    cases = {
        "not base64": ["é", "?" + state, state[:-1]],
        "another model": ["", "AAAA", sealed(b"\1" * 16 + raw[16:-4])],
        "bytes": [base64.b64encode(raw[:-1]).decode(), sealed(raw), sealed(raw[:-8]), sealed(raw[:20] + raw[28:-4])],
        "damaged": [base64.b64encode(raw[:30] + bytes([raw[30] ^ 1]) + raw[31:]).decode()],
        "no text leads to": [
            sealed(nan),
            sealed(raw[:16] + struct.pack("<I", 2**31) + raw[20:-4]),
            sealed(raw[:20] + struct.pack("<I", 2**31) + raw[24:-4]),
            sealed(raw[:24] + b"\x01\xe2\0\0" + raw[28:-4]),  # half a character, of a vocabulary of characters
            sealed(raw[:28] + struct.pack("<i", 12) + raw[32:-4]),
            sealed(raw[:28] + struct.pack("<i", -1) + raw[32:-4]),
        ],
    }
    for words, states in cases.items():
        for spoiled in states:
            with pytest.raises(ValueError, match=words):
                opaque.unpack(model, spoiled)
