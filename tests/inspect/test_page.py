"""Heat-maps and the page, opened from disk in a real browser without a network and driven as a person would."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from charlstm.inspect import heatmap, inspection, page, patterns, probe, saliency, units
from data_pipeline.shards import ArraySplit
from data_pipeline.vocabulary import Vocabulary
from tests.browser import chromium
from tests.inspect.conftest import PLANTED, WIDTH, drawn, text_of

# What would do something in a page, or to a text, if it were more than data.
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\0\u202e{}é€\n"
PATTERNS = {"inside “quotes”": patterns.expression("“[^”]*"), "digit": patterns.NAMED["digit"]}


@pytest.fixture(scope="module")
def found(model):
    return inspection.inspect(
        model, text_of(1500), "planted", length=600, arrays=["h", "f"], lookback=6, patterns=PATTERNS
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def opened(found, browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "inside.html"
    path.write_text(page.render([found]), "utf-8")
    browser.open(path)
    return browser


def test_a_heat_map_in_a_terminal_is_the_text_on_the_colors_of_its_values():
    text, values = "ab\ncd", np.array([-1.0, 0.0, 0.26, 1.0, 0.5])
    shown = heatmap.in_terminal(text, values, 1 << 24)
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == "ab↵\ncd"
    low, high = ("48;2;{};{};{}m".format(*end) for end in (heatmap.LOW, heatmap.HIGH))
    assert f"{low}a" in shown and f"{high}c" in shown and "\x1b[0mb" in shown
    assert heatmap.in_terminal(text, values, 0).splitlines()[:3] == ["ab↵", "8 2", "-"]
    assert "48;5;" in heatmap.in_terminal(text, values, 256)
    cut = heatmap.in_terminal("x" * 25, np.zeros(25), 0, width=10).splitlines()
    assert [line for line in cut if line] == ["x" * 10, "x" * 10, "x" * 5]
    assert heatmap.own_scale(np.linspace(-0.5, 0.5, 999)) == pytest.approx(0.495, abs=0.01)


def test_wide_characters_take_two_columns_and_those_that_combine_none():
    text, values = "ab日本か\u3099語cd\n", np.array([1.0, 0, 0.5, 0, -0.5, 1, -1, 0, 1, 0])
    assert patterns.columns("a日◌\u0301⟦FF⟧ＡÀ") == 1 + 2 + 1 + 4 + 2 + 1
    plain = heatmap.in_terminal(text, values, 0).splitlines()
    assert plain[:3] == ["ab日本か◌\u3099語cd↵", "8 4   4 88  8", "      -  -"]
    lines = heatmap.in_terminal("日" * 25, np.zeros(25), 0, width=11).splitlines()
    assert [line for line in lines if line] == ["日" * 5] * 5
    nodes = list(ElementTree.fromstring(heatmap.svg(text, values, "")).iter())
    texts = {(node.text, int(node.get("x")), int(node.get("textLength"))) for node in nodes if node.get("textLength")}
    cell = heatmap.CELL_WIDTH
    assert texts == {
        ("ab", 10, 2 * cell), ("日本か", 10 + 2 * cell, 6 * cell), ("◌\u3099", 10 + 8 * cell, cell),
        ("語", 10 + 9 * cell, 2 * cell), ("cd↵", 10 + 11 * cell, 3 * cell),
    }  # fmt: skip
    boxes = [(int(n.get("x")), int(n.get("width"))) for n in nodes if n.get("y") == f"{2.4 * heatmap.LINE_HEIGHT:g}"]
    starts = {0: 1, 2: 2, 6: 2, 8: 1, 9: 2, 12: 1}  # column -> columns
    assert boxes == [(10 + column * cell, width * cell) for column, width in starts.items()]


def test_the_svg_is_the_text_and_its_colors_and_nothing_that_is_run():
    values = np.linspace(-1, 1, len(HOSTILE))
    tree = ElementTree.fromstring(heatmap.svg(HOSTILE, values, "<unit>"))
    texts = "".join(node.text or "" for node in tree.iter() if node.tag.endswith("text"))
    assert (
        "<img src=x" in texts
        and "<unit>" in texts
        and {node.tag.rpartition("}")[2] for node in tree} <= {"rect", "text"}
    )
    fills = {node.get("fill") for node in tree.iter() if node.tag.endswith("rect")}
    assert {"#{:02x}{:02x}{:02x}".format(*color) for color in (heatmap.LOW, heatmap.HIGH)} <= fills


def test_the_page_fetches_nothing_and_is_the_same_each_time(found):
    content = page.render([found])
    assert content == page.render([found])
    assert not re.search(r"(src|href)=|@import|https?://", content.replace("http://www.w3.org/2000/svg", ""))


def test_it_opens_and_shows_the_values_as_colors(opened, found):
    assert not opened.errors and [address[:7] for address in opened.requested] == ["file://"]
    text = opened.run("document.querySelector('.text').textContent")
    assert text.replace("↵\n", "\n") == found.text
    assert opened.run("document.querySelector('.unit').value") == f"1:{PLANTED}", "the best of the first pattern"
    colors = opened.run("runs[0].spans.map(span => getComputedStyle(span).backgroundColor)")
    inside = patterns.expression("“[^”]*")(found.text)
    expected = [heatmap.color(step) for step in heatmap.classes(found.arrays["c"][:, PLANTED] / 127.0 - 1, 97 / 127)]
    assert colors == ["rgb({}, {}, {})".format(*color) for color in expected]
    assert len({color for color, is_inside in zip(colors, inside, strict=True) if is_inside}) == 1


def test_arrow_keys_flip_through_the_units_and_a_name_chooses_one(opened):
    opened.run("runs[0].show(0)")
    opened.press("ArrowRight")
    assert opened.run("document.querySelector('.unit').value") == "1:1"
    opened.press("ArrowLeft")
    opened.press("ArrowLeft")
    assert opened.run("document.querySelector('.unit').value") == f"2:{WIDTH - 1}"
    choose = (
        "(name => {const u = document.querySelector('.unit'); u.value = name; u.dispatchEvent(new Event('change'))})"
    )
    opened.run(f"{choose}('2:3')")
    assert opened.run("runs[0].place") == WIDTH + 3
    array = "document.querySelector('.array').value"
    opened.run(f"{choose}('1.f:2')")
    assert opened.run("runs[0].place") == 2 and opened.run(array) == "f"
    opened.run(f"{choose}('1.o:1')")  # the page has none
    assert opened.run("runs[0].place") == 2 and opened.run("!!document.querySelector('.unit.bad')")
    opened.run(f"{choose}('2.c:3')")
    assert opened.run("runs[0].place") == WIDTH + 3 and opened.run(array) == "c"
    opened.run(f"{choose}('9:3')")
    assert opened.run("runs[0].place") == WIDTH + 3 and opened.run("!!document.querySelector('.unit.bad')")


def test_units_are_found_and_ordered(opened):
    shown = "[...document.querySelectorAll('.list button')].map(button => button.textContent)"
    change = "(name, value) => {const node = document.querySelector(name); node.value = value;"
    change += " for (const kind of ['input', 'change']) node.dispatchEvent(new Event(kind))}"
    opened.run(f"({change})('.search', '2:')")
    assert opened.run(shown) == [f"2:{n}" for n in range(WIDTH)]
    opened.run(f"({change})('.search', '')")
    opened.run(f"({change})('.sort', 'for inside “quotes”')")
    assert opened.run(shown)[0] == f"1:{PLANTED} 1.000"
    opened.run(f"({change})('.sort', 'memory')")
    memory = [float(text.split()[1]) for text in opened.run(shown)]
    assert memory == sorted(memory, reverse=True) and len(memory) == 2 * WIDTH


def test_pointing_tells_what_was_expected_and_clicking_what_it_depends_on(opened, found):
    opened.drag("runs[0].spans[20]", "runs[0].spans[20]")
    told = opened.run("document.querySelector('.at').innerText")
    assert f"{found.expected.bits[20]:.2f} bits, rank {found.expected.rank[20]}" in told
    assert opened.run("document.querySelectorAll('.at tr').length") == 5
    classes = opened.run("runs[0].spans.slice(13, 21).map(span => span.className.split(' ')[1])")
    levels = np.round(np.round(found.saliency[20] / found.saliency[20].max() * 255) / 255 * heatmap.STEPS).astype(int)
    assert classes == ["s0", *(f"s{level}" for level in levels[::-1]), "s0"]
    assert opened.run("document.querySelectorAll('.decay path').length") == 1
    opened.run("runs[0].spans[20].closest('.text').focus()")
    opened.run("runs[0].move(30)")
    opened.press("ArrowRight", shift=True)
    opened.press("Enter")
    assert opened.run("runs[0].target") == 31
    opened.run("document.querySelector('.what').value = 'unit'")


def test_a_selected_span_finds_the_units_that_are_on_in_it_and_its_like(opened, found):
    first = found.text.index("“", 5)
    last = found.text.index("”", first) - 1
    opened.run("document.querySelector('.threshold').value = 0.7")
    opened.drag(f"runs[0].spans[{first}]", f"runs[0].spans[{last}]")
    assert opened.run("runs[0].span") == [first, last]
    assert f"1:{PLANTED}" in opened.run("[...document.querySelectorAll('.span button')].map(b => b.textContent)")
    matches = opened.run("runs[0].found")
    assert matches and all(not first <= match <= last for match in matches)
    assert any(found.text[match] == "“" for match in matches)


def test_guesses_are_drawn_under_the_text(opened, found):
    opened.run("document.querySelector('.with-rows').click()")
    under = opened.run("[...runs[0].spans[4].querySelectorAll('small')].map(node => node.textContent)")
    symbols = found.model.vocabulary.decode(found.expected.guesses[5])
    assert under == [{" ": "·", "\n": "↵"}.get(symbol, symbol) for symbol in symbols]
    opened.run("document.querySelector('.with-rows').click()")


def test_both_themes_are_drawn_and_legible(opened, tmp_path):
    grounds = set()
    for theme in ("light", "dark"):
        opened.screenshot(tmp_path / f"{theme}.png", theme)
        assert (tmp_path / f"{theme}.png").stat().st_size > 20_000
        ink, ground = opened.run(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, ground)]
        assert abs(light[0] - light[1]) > 550
        grounds.add(ground)
    assert len(grounds) == 2
    opened.screenshot(tmp_path / "light.png", "light")


def test_a_hostile_text_of_bytes_and_two_runs_side_by_side_do_nothing_but_show(browser, tmp_path):
    models = [drawn(Vocabulary("bytes"), num_layers=1), drawn(Vocabulary("bytes"), cell="gru", hidden_size=4)]
    text = (HOSTILE * 6).encode() + b"\xff"
    found = [inspection.inspect(m, text, f"<b>{m.config.model.cell}", lookback=3) for m in models]
    (tmp_path / "two.html").write_text(page.render(found), "utf-8")
    before = len(browser.errors), len(browser.requested)
    browser.open(tmp_path / "two.html")
    assert (len(browser.errors), len(browser.requested) - 1) == before
    assert browser.run("document.title") == "<b>lstm, <b>gru" and browser.run("document.images.length") == 0
    shown = browser.run("runs.map(run => run.spans.map(span => span.textContent))")
    assert shown[0] == shown[1] == [patterns.visible(c) for c in text.decode("utf-8", "surrogateescape")]
    assert "⟦202E⟧" in shown[0] and "⟦FF⟧" in shown[0] and "€" in shown[0] and "␀" in shown[0]
    places = browser.run("runs.map(run => run.place)")
    browser.press("ArrowRight")
    assert browser.run("runs.map(run => run.place)") == [(places[0] + 1) % 6, (places[1] + 1) % 8]


def test_symbols_that_are_not_in_the_vocabulary_are_counted_and_shown(model):
    found = inspection.inspect(model, "abZ" * 20, "unknown", length=30, lookback=0, patterns={})
    assert found.unknown == 20 and found.left_out == 30 and found.text == "ab\ufffd" * 10
    assert "20 symbols are not in the vocabulary" in page._about(found) and "30 more were read" in page._about(found)
    with pytest.raises(ValueError, match="the text is empty"):
        inspection.inspect(model, "", "empty")


def test_saliency_is_of_as_many_characters_as_asked_for_and_of_all_their_bytes():
    model, text = drawn(Vocabulary("bytes"), num_layers=1), "日本語é文a" * 4
    found = inspection.inspect(model, text, "bytes", lookback=8, patterns={}).saliency
    of_bytes = saliency.saliency(model, ArraySplit(text, model.vocabulary), 40)
    ends = np.cumsum([len(character.encode()) for character in text]).tolist()
    for place, back in ((20, 1), (20, 8), (11, 3), (2, 2)):
        before = range(ends[place - back - 1] if place > back else 0, ends[place - back])  # bytes of that character
        expected = sum(of_bytes[ends[place] - 1, ends[place] - 1 - byte - 1] for byte in before)
        np.testing.assert_allclose(found[place, back - 1], expected, rtol=1e-3)
    assert found[8:].min() > 0 and not found[2, 2:].any()


def test_an_unknown_symbol_is_read_as_one_where_the_vocabulary_has_a_replacement_character():
    model, text = drawn(Vocabulary("characters", " ab\ufffd")), "abZ" * 20
    found = inspection.inspect(model, text, "unknown", length=30, lookback=0, patterns={})
    np.testing.assert_allclose(found.expected.bits, model.bits(text)[:30], atol=1e-4)
    levels = np.tanh(np.concatenate([*model.trace(text, ["1.c", "2.c"]).values()], axis=1))[:30] * 127 + 127
    np.testing.assert_allclose(found.arrays["c"], levels, atol=0.6)
    shown, split = inspection.first_characters(model, text, 30)
    assert shown == found.text and split.read(0, 30).tolist() == [2, 3, 0] * 10 and split.unknown == 10
    assert not probe.examples(model, text * 100, patterns.expression("a"))[0].read(2, 3).any()


def test_a_large_page_has_fewer_levels_and_they_stay_near(found, monkeypatch):
    exact = np.frombuffer(page._levels(found), np.uint8).astype(int)
    monkeypatch.setattr(page, "LARGE", 100)
    coarse = np.frombuffer(page._levels(found), np.uint8).astype(int)
    values = 3 * found.arrays["c"].size
    assert np.abs(exact - coarse)[:values].max() <= 2 and len(np.unique(coarse[:values])) <= 65
    assert np.array_equal(exact[values:], coarse[values:]) and (coarse[:values][exact[:values] == 127] == 127).all()


def test_it_opens_with_a_unit_where_a_model_has_it_and_orders_by_memory_where_a_gate_keeps_the_state(browser, tmp_path):
    how = {"num_layers": 1, "initializer": "normal"}
    models = [drawn(cell=cell, hidden_size=H, **how) for cell, H in (("lstm", 6), ("gru", 4), ("rnn", 6))]
    found = [
        inspection.inspect(m, text_of(300), m.config.model.cell, lookback=0, arrays=["h"], patterns={}) for m in models
    ]
    (tmp_path / "unit.html").write_text(page.render(found, units.Unit(1, "h", 5)), "utf-8")
    browser.open(tmp_path / "unit.html")
    assert browser.run("runs.map(run => run.place)") == [5, 0, 5]
    assert browser.run("[...document.querySelectorAll('.array')].map(array => array.value)") == ["h", "h", "h"]
    sorts = "[...document.querySelectorAll('.sort')].map(sort => sort.textContent.includes('memory'))"
    assert browser.run(sorts) == [True, True, False]
