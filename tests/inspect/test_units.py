"""Which units know a pattern: planted ones are found, chance is not, and a text read side by side is the text."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import charlstm as cl
from charlstm.inspect import patterns, ranking, saliency, surprise, survey, trace, units
from charlstm.model import language_model
from charlstm.model.layer import CELLS
from data_pipeline.mixture import Joined
from data_pipeline.shards import ArraySplit
from data_pipeline.vocabulary import Vocabulary
from tests.inspect.conftest import CHARACTERS, PLANTED, WIDTH, drawn, text_of

INSIDE = "“[^”]*"


def test_a_trace_has_the_models_logits_and_comes_in_chunks_that_join(model):
    text = text_of(2 * trace.WINDOW + 20)
    found = model.trace(text)
    logits, _ = model(CHARACTERS.encode(text))
    np.testing.assert_allclose(found["logits"], logits, atol=2e-4)
    assert set(found) == {"logits", *(f"{layer}.{name}" for layer in (1, 2) for name in "chifgo")}
    assert np.array_equal(model.trace(ArraySplit(text, CHARACTERS), ["2.h"])["2.h"], found["2.h"])
    parts = list(cl.inspect.chunks(model, ArraySplit(text, CHARACTERS), ["2.h"]))
    assert [len(part["2.h"]) for part in parts] == [trace.WINDOW, trace.WINDOW, 20]
    np.testing.assert_allclose(np.concatenate([part["2.h"] for part in parts]), found["2.h"], atol=2e-4)
    assert model.trace("")["1.c"].shape == (0, WIDTH)
    with pytest.raises(ValueError, match=r"there is no array '3\.c': use logits, 1\.c"):
        model.trace(text, ["3.c"])


def test_a_planted_unit_is_found_first_and_never_errs_in_a_text_read_whole_or_side_by_side(model):
    for length in (3000, 5 * survey.LEAST_ROW + 17):
        told = []
        found = cl.inspect.units_for(model, text_of(length), INSIDE, progress=lambda *how_far: told.append(how_far))  # noqa: B023
        assert told[-1] == (length, length) and told == sorted(told)
        assert found.units[0].unit == units.Unit(1, "c", PLANTED) and not found.units[0].is_low
        assert found.units[0].auc == found.units[0].auc_chosen == found.units[0].f1 == 1
        assert found.inside == sum(len(match[0]) for match in re.finditer(INSIDE, text_of(length)))
        assert found.symbols == length and found.units[1].auc < 1
    outside = cl.inspect.units_for(model, text_of(3000), "(?<=”)[^“]+").units[0]
    assert outside.unit.number == PLANTED and outside.is_low


def test_the_area_is_the_share_of_pairs_in_the_right_order(model):
    text = text_of(2500)
    found = cl.inspect.units_for(model, text, INSIDE, most=99)
    values = np.concatenate([np.tanh(model.trace(text, [f"{n}.c"])[f"{n}.c"]) for n in (1, 2)], axis=1)
    inside = patterns.expression(INSIDE)(text)
    held_out = np.arange(len(text)) // min(survey.BLOCK, len(text) // 8) % 2 == 1
    for ranked in found.units:
        level = np.round(values[:, (ranked.unit.layer - 1) * WIDTH + ranked.unit.number] * 127)
        a, b = level[inside & held_out], level[~inside & held_out]
        pairs = (a[:, None] > b[None]).mean() + (a[:, None] == b[None]).mean() / 2
        assert ranked.auc == pytest.approx(1 - pairs if ranked.is_low else pairs, abs=5e-3)


def test_the_best_of_many_units_by_chance_is_no_better_on_the_half_that_did_not_choose_it(model):
    random = np.random.default_rng(1)
    wide = drawn(hidden_size=48, num_layers=1)
    found = [
        cl.inspect.units_for(wide, text_of(600), lambda text: random.random(len(text)) < 0.1, 1).units[0]
        for _ in range(6)
    ]
    assert np.mean([ranked.auc_chosen for ranked in found]) > 0.6 and abs(np.mean([r.auc for r in found]) - 0.5) < 0.09


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [("(", "is no regular expression"), ("zzz", "matches nothing"), ("(?s).", "matches everything")],
)
def test_a_pattern_that_ranks_nothing_is_refused(pattern, sentence, model):
    with pytest.raises(ValueError, match=sentence):
        cl.inspect.units_for(model, text_of(900), pattern)


def test_named_patterns_label_what_they_say():
    text = 'x = f(a, [1])  # it "is"\n\n    y = 2\n'
    inside = {name: "".join(np.where(p(text), list(text), "")) for name, p in patterns.NAMED.items()}
    assert inside["inside quotes"] == '"is"' and inside["inside a comment"] == '# it "is"'
    assert inside["inside brackets"] == "(a, [1]" and inside["inside two brackets"] == "[1"
    assert inside["indentation"] == "    " and inside["digit"] == "12" and inside["first of a line"] == "x "
    assert "".join(np.where(patterns.NAMED["past column 20"](text), list(text), "")) == '"is"'
    assert not patterns.deeper_than(0)(")) a\n\n(b")[:5].any() and not patterns.deeper_than(0)("(a\n\nb")[4:].any()


def test_capitals_of_any_script_are_upper_case():
    text = "Большой ДОМ, Šárka Łódź ΑΒΓ ß"
    assert "".join(np.array(list(text))[patterns.NAMED["upper case"](text)]) == "БДОМŠŁΑΒΓ"


@pytest.mark.parametrize("name", patterns.NAMED)
def test_a_named_pattern_has_the_same_inside_with_windows_line_ends(name):
    text = 'Of what ( is open { here, # "1" and so on\n\n    [it] "goes" on\nof a line (x // y\n \nz\n'
    label, windows = patterns.NAMED[name], text.replace("\n", "\r\n")
    ends = np.array(list(windows)) == "\r"
    np.testing.assert_array_equal(label(windows)[~ends], label(text))
    assert "brackets" in name or not label(windows)[ends].any()


@pytest.mark.parametrize(
    ("name", "plain", "text"),
    [
        ("inside a comment", r"#[^\n]*|//[^\n]*|/\*(?s:.*?)\*/", "/* a\nb */ c /*/ d // e */\n f /*// g\n/* # h /* i"),
        ("inside quotes", r'"[^"\n]*"|“[^”]*”|' + r"(?<!\w)'[^'\n]*'(?!\w)", "“a\n“b” c „d“ 'e' don't \"f\" “ 'g' “"),
    ],
)
def test_what_is_opened_and_never_closed_is_outside_and_costs_no_more_than_other_text(name, plain, text):
    random, label = np.random.default_rng(0), patterns.NAMED[name]
    for drawn_text in [text, *("".join(random.choice(list("/*#\n a“”'\""), 40)) for _ in range(2000))]:
        np.testing.assert_array_equal(label(drawn_text), patterns.expression(plain)(drawn_text), drawn_text)
    assert not label("/* “ab„ " * 100_000).any()  # for minutes, if each opener's closer is looked for to the end


def test_documents_given_one_by_one_have_the_logits_of_a_trace_that_resets_between_them():
    model = drawn(reset_state="document", document_separator="00")
    text = "ab“cd00ef gh00”bc"
    ids, begins = CHARACTERS.encode(text), [0, text.index("00") + 1, text.rindex("00") + 1, len(text)]
    by_document = [model(ids[start:stop])[0] for start, stop in itertools.pairwise(begins)]
    np.testing.assert_allclose(np.concatenate(by_document), model.trace(text, ["logits"])["logits"], atol=1e-5)
    assert np.abs(model(ids)[0] - np.concatenate(by_document))[begins[1] :].max() > 0.1, "one call resets nothing"


def test_chunks_of_a_string_are_those_of_all_its_bytes():
    chunks = cl.inspect.chunks(drawn(Vocabulary("bytes")), "é" * trace.WINDOW + "z" * 10, ["1.c"])
    assert [len(chunk["1.c"]) for chunk in chunks] == [trace.WINDOW, trace.WINDOW, 10]


def test_characters_of_several_bytes_and_what_cannot_be_seen():
    ids = np.frombuffer("aé€😀".encode() + b"\xff", np.uint8)
    text, lengths = patterns.symbols_of(Vocabulary("bytes"), ids)
    assert lengths.tolist() == [1, 2, 3, 4, 1] and text == "aé€😀\udcff"
    shown = "".join(map(patterns.visible, "a\n\0\u202e\u0301\udcff"))
    assert shown == "a↵␀⟦202E⟧◌\u0301⟦FF⟧"


def test_ends_are_where_a_unit_is_highest_and_lowest_and_gates_are_counted(model):
    text = text_of(2000)
    found = survey.read(model, ArraySplit(text, CHARACTERS), {})
    named = model.trace(text)
    for unit in range(WIDTH):
        values = np.tanh(named["1.c"][:, unit])
        for kept, best in ((found.highest, values.max()), (found.lowest, values.min())):
            places = kept[:, 1, unit][kept[:, 0, unit] >= 0].astype(int)
            assert abs(values[places[0]] - best) < 0.01 and places.min() >= 0
            assert (np.abs(np.diff(np.sort(places))) >= survey.APART).all()
    short = survey.read(model, ArraySplit(text[:70], CHARACTERS), {}).highest
    assert set(short[:, 1][short[:, 0] >= 0].astype(int).ravel()) <= set(range(70)) and (short[3:, 0] == -1).all()
    for gate in "ifo":
        values = np.concatenate([named[f"{n}.{gate}"] for n in (1, 2)], axis=1)
        expected = (values < 0.1).sum(0), (values > 0.9).sum(0), values.sum(0)
        np.testing.assert_allclose(found.gates[gate], expected, atol=1.5)


def test_levels_are_counted_by_patterns_that_overlap_and_by_halves(model):
    text = text_of(3000)
    found = survey.read(
        model, ArraySplit(text, CHARACTERS), {name: patterns.expression(name) for name in (INSIDE, "[a-d]")}
    )
    inside = [*(patterns.expression(name)(text) for name in found.patterns), np.ones(len(text), bool)]
    half = np.arange(len(text)) // min(survey.BLOCK, len(text) // 8) % 2
    values = np.concatenate([np.tanh(model.trace(text, [f"{n}.c"])[f"{n}.c"]) for n in (1, 2)], axis=1)
    for number, label in enumerate(inside):
        for which in (0, 1):
            expected = values[label & (half == which)].sum(0)
            counted = found.levels[number, which]
            assert (counted.sum(1) == (label & (half == which)).sum()).all()
            np.testing.assert_allclose(counted @ units.LEVELS, expected, atol=len(text) / 500)
    with pytest.raises(ValueError, match="61 patterns are more than"):
        survey.read(model, ArraySplit(text, CHARACTERS), dict.fromkeys(map(str, range(61)), patterns.expression("a")))


@pytest.mark.parametrize(
    "settings", [{"cell": "gru"}, {"cell": "mlstm"}, {"cell": "rnn"}, {"cap_input_gate": True}, {"zoneout": 0.1}]
)
def test_states_without_gates_are_those_of_a_trace(settings):
    model, ids = drawn(embedding_size=12, **settings), np.arange(40).reshape(4, 10) % CHARACTERS.size
    state = trace.first_state(model.config.model, model.params, 4)
    reset = np.arange(40).reshape(4, 10) % 7 == 3
    both = [
        language_model.trace(model.config.model, model.params, state, ids, reset, with_gates=with_gates)
        for with_gates in (True, False)
    ]
    (after, logits, named), (after_too, logits_too, states) = both
    for a, b in zip(jax.tree.leaves((after, logits)), jax.tree.leaves((after_too, logits_too)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert {f"{n}.h" for n in (1, 2)} <= set(states) <= set(named)
    for name, array in states.items():
        np.testing.assert_allclose(array, named[name], atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_saliency_is_as_large_as_what_another_symbol_in_its_place_changes(cell):
    model, text = drawn(cell=cell), text_of(40)
    got = saliency.saliency(model, ArraySplit(text, CHARACTERS), 1)[20:]
    others = [np.abs(model.bits(text[:t] + "é" + text[t + 1 :]) - model.bits(text))[t + 1] for t in range(19, 39)]
    assert np.mean(got) > 0.1 * np.mean(others)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_saliency_is_the_derivative_of_the_whole_text(cell):
    model, text = drawn(cell=cell), text_of(40)
    ids = CHARACTERS.encode(text).astype(np.int32)
    got = saliency.saliency(model, ArraySplit(text, CHARACTERS), 5)
    start, none = trace.first_state(model.config.model, model.params, 1), np.zeros((1, len(ids)), bool)

    def log_probability(scale_BT, target):
        _, logits, _ = language_model.trace(model.config.model, model.params, start, ids[None], none, (), scale_BT)
        return jax.nn.log_softmax(logits[target - 1, 0])[ids[target]]

    for target in (1, 3, 30):
        expected = np.abs(jax.grad(log_probability)(jnp.ones((1, len(ids))), target))[0, :target][::-1][:5]
        np.testing.assert_allclose(got[target, : len(expected)], expected, rtol=1e-3, atol=1e-6)
        assert not got[target, len(expected) :].any()
    assert not got[0].any()


def test_surprise_is_that_of_the_score_and_ranks_and_guesses_are_those_of_the_logits(model):
    text = text_of(300)
    found = surprise.joined(surprise.expected(model, ArraySplit(text, CHARACTERS)))
    np.testing.assert_allclose(found.bits, model.bits(text), atol=1e-5)
    assert found.bits.sum() == pytest.approx(model.evaluate(text).bits, rel=1e-5)
    logits, ids = np.asarray(model(CHARACTERS.encode(text))[0]), CHARACTERS.encode(text)
    for place in (1, 7, 299):
        order = np.argsort(-logits[place - 1], kind="stable")
        assert found.guesses[place].tolist() == order[:5].tolist()
        assert found.rank[place] == 1 + order.tolist().index(ids[place])
    assert (found.entropy > 0).all() and (found.entropy <= np.log2(CHARACTERS.size) + 1e-5).all()


def test_a_split_of_another_vocabulary_is_refused_with_both(model, tmp_path):
    split = cl.load_corpus(text_of(3000), cache_dir=str(tmp_path / "cache")).train
    for refused in (
        lambda: model.evaluate(split),
        lambda: model.export(tmp_path / "page", "html", split),
        lambda: ranking.units_for(model, split, INSIDE),
        lambda: next(trace.chunks(model, split)),
        lambda: next(trace.chunks(drawn(reverse=True), Joined([split]))),
    ):
        with pytest.raises(ValueError, match=r"has a vocabulary of 19 characters .* has a vocabulary of 256 bytes"):
            refused()


def test_what_is_neither_a_text_nor_a_split_is_refused_in_a_sentence(model, tmp_path):
    corpus = cl.load_corpus(text_of(3000), vocabulary="characters", cache_dir=str(tmp_path / "cache"))
    for refused, kind in (
        (lambda: model.evaluate(corpus), "Corpus"),
        (lambda: ranking.units_for(model, corpus, INSIDE), "Corpus"),
        (lambda: next(trace.chunks(model, corpus)), "Corpus"),
        (lambda: model.evaluate(tmp_path / "text.txt"), "PosixPath"),
        (lambda: model.trace(CHARACTERS.encode("abc")), "ndarray"),
        (lambda: model.sample(b"a", 2), "bytes"),
    ):
        with pytest.raises(TypeError, match=f"(text is a|is of type) {kind}: give"):
            refused()


def test_units_are_named_and_what_is_none_is_refused(model):
    config = model.config.model
    assert str(units.parse("1:4", config)) == "1.c:4" and units.parse("2.f:0", config) == (2, "f", 0)
    assert units.parse("1:0", drawn(cell="gru").config.model).array == "h"
    for name, sentence in {
        "3:0": "the layers are 1 to 2", "1:6": "the 6 units of layer 1 are 0 to 5", "one": "names no unit",
        "1.r:0": "the arrays of cell=lstm are c, h, i, f, g, o",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            units.parse(name, config)
    for clamp, sentence in (
        ({"1.f:0": 1.0}, "only states can"),
        ({"1:0": float("nan")}, "finite"),
        ({"1:3": 1.0, "1.c:3": -1.0}, "1.c:3 cannot be held at two values"),
    ):
        with pytest.raises(ValueError, match=sentence):
            units.held(clamp, config)
    assert units.held({"1:3": 1.0, "1.h:3": -1.0, "2:3": 0.5}, config)
    for text, sentence in ("1:0:high", "has no value"), ("1:3:1, 1:3:-1", "has 1:3 twice"):
        with pytest.raises(ValueError, match=sentence):
            units.parse_clamp(text)


def test_a_held_unit_changes_what_is_written_and_only_from_the_prompt_on(model):
    how = {"length": 60, "seed": 3}
    free, high = model.sample("“ab", **how), model.sample("“ab", **how, clamp={"1:4": 5.0})
    assert free != high and free.startswith("“ab") and high.startswith("“ab")
    assert model.sample("“ab", **how, clamp={"1:4": 5.0}) == high
    # A unit that is held where it is anyway changes nothing: the textbook step draws what the fast one does.
    assert model.sample("“ab", length=2, seed=3, clamp={"1:4": 1.0}) == model.sample("“ab", length=2, seed=3)
    assert ranking.unusable(survey.read(model, ArraySplit("a", CHARACTERS), {"b": patterns.expression("b")}), 0)


def test_a_probe_finds_the_planted_unit_alone():
    pytest.importorskip("sklearn", reason="extra inspect is not installed")
    from charlstm.inspect import probe
    from tests.inspect.conftest import planted

    found = probe.probe(planted(), text_of(3000), INSIDE)
    assert found.auc > 0.999 and found.weights[0][0] == units.Unit(1, "c", PLANTED) and found.weights[0][1] > 0
    with pytest.raises(ValueError, match=r"no probe of 'digit' can be fitted: .* the text's first 500 symbols"):
        probe.probe(planted(), "a" * 500, "digit")
