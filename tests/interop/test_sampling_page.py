"""A page that writes, opened from disk in a real browser without a network and driven as a person would."""

import json
import re
import urllib.parse
from pathlib import Path

import jax
import numpy as np
import pytest

from charlstm.api import Model
from charlstm.interop import sampling_page
from charlstm.interop.exported import Exported, folded
from charlstm.run import run_directory
from data_pipeline.shards import ArraySplit
from data_pipeline.vocabulary import Vocabulary
from tests.browser import chromium
from tests.interop.conftest import BYTES, CHARACTERS, MODELS, assert_close, drawn, each, logits_of, windows_of

WRITE = """(settings => {
  for (const [name, value] of Object.entries(settings)) form.elements[name].value = value;
  form.querySelector(".write").click();
})"""
SETTLED = """new Promise((done, fail) => {
  const end = Date.now() + 60000;
  const late = () => Date.now() > end;
  const ask = () => !running ? done(written) : late() ? fail(new Error("it never ends")) : setTimeout(ask, 10);
  setTimeout(ask, 10);
})"""
READ = """windows => {
  const state = engine.model.first();
  return windows.map(ids => ids.map(id => [...engine.model.read(id, state)]));
}"""
HALVES = """values => {
  const all = new Uint16Array(values);
  return [...unpacked({arrays: [["w", 1, all.length]], format: "float16"}, all.buffer).w.data];
}"""
DRAW = """(count, temperature, topK) => {
  const counts = [0, 0, 0, 0], logits = new Float64Array([1, -1, 0.5, -Infinity]);
  for (let i = 0; i < count; i++) counts[choose(logits, temperature, topK, uniform(7, i))]++;
  return counts;
}"""
WATCH = """window.pieces = [];
new MutationObserver(() => pieces.push([written.at(-1), document.querySelector(".bars .chosen span")?.textContent]))
  .observe(document.querySelector(".bars"), {childList: true});"""
PARROT = """after => {
  engine.model.read = (id) => new Float64Array(256).fill(-50).fill(50, after[id] ?? 195, (after[id] ?? 195) + 1);
  engine.state = null;
}"""
# A server that sends each piece as an event, in parts that are cut anywhere.
SERVE = """pieces => {
  window.asked = [];
  window.fetch = async (address, {body}) => {
    asked.push(JSON.parse(body));
    const events = pieces.map(([text, best]) => JSON.stringify({choices: [{text, logprobs: {top_logprobs: [best]}}]}));
    const bytes = new TextEncoder().encode([...events, "[DONE]"].map(event => `data: ${event}\r\n\r\n`).join(""));
    let at = 0;
    return new Response(new ReadableStream({pull(to) {
      if (at < bytes.length) to.enqueue(bytes.slice(at, at += 7));
      else to.close();
    }}));
  };
}"""
# One that never answers, and then answers nothing.
NEVER = """() => {
  window.fetch = (address, {signal}) => new Promise((_, fail) => {
    signal.onabort = () => fail(signal.reason);
    window.fetch = async () => new Response("data: [DONE]\\n\\n");
  });
}"""
COLORS = """["body", ".paper", "textarea", ".write"].map(name => {
  const style = getComputedStyle(document.querySelector(name));
  return [style.color, style.backgroundColor];
})"""
BARS = "[...document.querySelectorAll('.bars button')].map(b => [b.firstChild.textContent, b.lastChild.textContent])"
STATUS = "document.querySelector('.status').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def page_of(model: Model, folder: Path) -> Path:
    return model.export(folder / "page", "html") / "index.html"


def opened(browser, model: Model, folder: Path):
    browser.open(page_of(model, folder))
    return browser


def rounded(model: Model, format: str) -> Model:
    params = sampling_page.pack(folded(model.params), format)[2]
    return Model(model.config, model.vocabulary, params, model.step)


def ask(browser, **settings) -> str:
    """Fills in the form, presses Write and returns what was written."""
    browser.run(
        f"{WRITE}({json.dumps({'prompt': '', 'seed': 1, 'count': 50, 'temperature': 1, 'topK': ''} | settings)})"
    )
    return browser.run(SETTLED)


def check_logits(browser, model: Model, folder: Path, format: str) -> None:
    opened(browser, model, folder)
    ids_NBT = windows_of(model)
    found = np.array(browser.run(f"({READ})({ids_NBT[:, 0].tolist()})"))[:, None]
    assert_close(found, logits_of(rounded(model, format), ids_NBT))


@pytest.mark.parametrize("name", each(MODELS))
def test_logits_over_three_windows_are_those_of_the_rounded_model(name, browser, tmp_path):
    check_logits(browser, drawn(name), tmp_path, "float16")


def test_so_they_are_of_a_larger_model_whose_weights_are_int8(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_page, "MOST_FLOAT16", 100)
    check_logits(browser, drawn("mlstm mogrifier"), tmp_path, "int8")


def test_every_number_of_float16_is_read(browser, tmp_path):
    opened(browser, drawn("rnn"), tmp_path)
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    assert np.array_equal(np.array(browser.run(f"({HALVES})({halves.tolist()})")), halves.view(np.float16))


@pytest.mark.parametrize("format", ["float16", "int8"])
def test_rounding_moves_each_weight_by_no_more_than_half_a_step(format):
    params = folded(drawn("mlstm").params)
    after = sampling_page.pack(params, format)[2]
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        step = np.abs(before) * 2.0**-10 if format == "float16" else np.abs(before).max() / 127
        assert np.all(np.abs(now - before) <= step / 2 + 1e-8) and (before.ndim == 2 or np.array_equal(now, before))


def test_it_asks_nothing_of_the_network_and_writes_what_the_seed_says(browser, tmp_path):
    model = drawn("lstm")
    before = len(browser.requested)
    opened(browser, model, tmp_path)
    assert [address[:7] for address in browser.requested[before:]] == ["file://"] and not browser.errors
    text = ask(browser, prompt="abc", seed=5)
    assert len(text) == 50 and set(text) <= set(CHARACTERS.characters)
    assert "50 characters" in browser.run(STATUS) and "seed 5." in browser.run(STATUS)
    assert browser.run("document.querySelector('.paper').textContent") == "abc" + text
    assert ask(browser, prompt="abc", seed=5) == text != ask(browser, prompt="abc", seed=6)
    # Going on gives what a greater length would have given, and reads nothing twice.
    assert ask(browser, prompt="abc", seed=5, count=20) == text[:20]
    browser.run("window.fed = 0; const feed = engine.feed.bind(engine); engine.feed = (id) => { fed++; feed(id); };")
    browser.run("(form.elements.count.value = 30, document.querySelector('.on').click())")
    assert browser.run(SETTLED) == text and browser.run("fed") == 30


def test_temperature_0_takes_the_most_probable_symbol_as_the_model_does(browser, tmp_path):
    model = drawn("gru")
    opened(browser, model, tmp_path)
    expected = rounded(model, "float16").sample("ab", 40, temperature=0)
    assert "ab" + ask(browser, prompt="ab", temperature=0, count=40) == expected
    assert "ab" + ask(browser, prompt="ab", temperature=1.5, topK=1, count=40) == expected


def test_symbols_are_drawn_as_often_as_the_model_says(browser, tmp_path):
    opened(browser, drawn("rnn"), tmp_path)
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        counts = np.array(browser.run(f"({DRAW})(40000, {temperature}, {top_k})"))
        weights = np.exp(np.array([1, -1, 0.5, -np.inf]) / temperature)
        weights[1] *= top_k == 0
        share = weights / weights.sum()
        assert np.all(np.abs(counts / 40000 - share) <= 5 * np.sqrt(share * (1 - share) / 40000))


def test_bars_are_what_the_model_expects_and_a_press_takes_a_symbol(browser, tmp_path):
    model = drawn("lstm one-hot")
    opened(browser, model, tmp_path)
    text = "ab" + ask(browser, prompt="ab", count=10)

    def expected(text: str) -> list[tuple[str, float]]:
        logits = np.asarray(rounded(model, "float16")(model.vocabulary.encode(text))[0][-1], np.float64)
        logits[0] = -np.inf  # the unknown symbol, which is never written
        shares = np.exp(logits) / np.exp(logits).sum()
        return [(model.vocabulary.decode(np.array([k])), shares[k]) for k in np.argsort(-shares)[:10]]

    def check(text: str) -> None:
        shown, wanted = browser.run(BARS), expected(text)
        assert [name for name, _ in shown] == [{" ": "␣", "\n": "↵"}.get(symbol, symbol) for symbol, _ in wanted]
        assert [float(share.strip("< %")) for _, share in shown] == pytest.approx(
            [100 * share for _, share in wanted], abs=0.051
        )

    check(text)
    third = expected(text)[2][0]
    browser.drag("document.querySelectorAll('.bars button')[2]", "document.querySelectorAll('.bars button')[2]")
    browser.run(SETTLED)
    assert browser.run("prompt + written") == text + third
    check(text + third)


def test_stop_stops_it_and_it_goes_on_from_there(browser, tmp_path):
    opened(browser, drawn("lstm"), tmp_path)
    browser.run(f"{WRITE}({{prompt: 'ab', count: 100000, seed: 3, temperature: 1, topK: ''}})")
    browser.run("new Promise(done => { const ask = () => written ? done() : setTimeout(ask, 5); ask(); })")
    assert browser.run("[document.querySelector('.write').hidden, document.querySelector('.stop').hidden]") == [
        True,
        False,
    ]
    browser.drag("document.querySelector('.stop')", "document.querySelector('.stop')")
    text = browser.run(SETTLED)
    assert 0 < len(text) < 100000 and "characters" in browser.run(STATUS)
    assert browser.run("document.querySelectorAll('.bars button').length") == 10
    browser.run("(form.elements.count.value = 5, document.querySelector('.on').click())")
    assert len(browser.run(SETTLED)) == len(text) + 5
    browser.run("(form.elements.count.value = 100000, document.querySelector('.on').click())")
    browser.press("Escape")
    assert len(browser.run(SETTLED)) < 100000 and not browser.errors


def test_slowly_is_a_symbol_at_a_time_with_the_chosen_one_marked(browser, tmp_path):
    opened(browser, drawn("lstm"), tmp_path)
    browser.run("form.elements.slowly.checked = true")
    browser.run(WATCH)
    text = ask(browser, prompt="a", count=4)
    seen = browser.run("pieces")
    assert [last for last, _ in seen[:4]] == list(text)
    signs = {" ": "␣", "\n": "↵"}
    assert all(chosen in (None, signs.get(last, last)) for last, chosen in seen[:4])
    assert any(chosen for _, chosen in seen[:4])


def test_bytes_become_text_as_whole_characters(browser, tmp_path):
    opened(browser, drawn("lstm", BYTES), tmp_path)
    # As a model that knows one text of characters of two, three and four bytes.
    text = "é€😀"
    after = {now: then for now, then in zip(text.encode(), text.encode()[1:] + text.encode()[:1], strict=True)}
    browser.run(f"({PARROT})({json.dumps(after)})")
    assert ask(browser, prompt="x", count=18) == "é€😀" * 2
    # A text that ends within a character does not show a part of it; a part of one cannot be put into the text.
    assert ask(browser, prompt="x", count=4) == "é"
    assert browser.run("document.querySelector('.bars button').disabled") and browser.run(BARS)[0][0] == "⟦E2⟧"


def test_symbols_that_are_not_known_are_named_and_never_written(browser, tmp_path):
    model = drawn("lstm")
    opened(browser, model, tmp_path)
    text = ask(browser, prompt="aZb€", temperature=1.5, count=400)
    assert "no such symbol: Z €" in browser.run(STATUS) and "\ufffd" not in text
    expected = rounded(model, "float16")(model.vocabulary.encode("aZb€", "map"))[0][-1]
    browser.run("(async () => { await engine.reach(engine.encode('aZb€')); })()")
    assert_close(np.array(browser.run("[...engine.logits]"))[1:], np.asarray(expected)[1:])


def test_documents_begin_with_their_separator_and_end_before_it(browser, tmp_path):
    model = drawn("lstm initial state", reset_state="document", document_separator=r"ab")
    opened(browser, model, tmp_path)
    twin, separator = rounded(model, "float16"), run_directory.separator(model.config, model.vocabulary)
    assert len(separator) == 2
    for prompt in ("", "j"):
        expected = twin.sample(prompt, 60, temperature=0)
        assert prompt + ask(browser, prompt=prompt, temperature=0, count=60) == expected
    # Symbol by symbol, until one ends: no part of the separator is shown.
    ended = 0
    for seed in range(12):
        text = ask(browser, prompt="c", seed=seed, count=400)
        assert "ab" not in text
        if browser.run("ended"):
            ended += 1
            assert "ended by itself" in browser.run(STATUS) and browser.run("document.querySelector('.on').disabled")
        else:
            assert len(text) == 400
    assert ended


def test_the_page_says_what_it_is_and_how_good_it_is_after_rounding(tmp_path, capsys):
    model = drawn("gru", corpus="/home/someone/secret <b>plays.txt")
    text = CHARACTERS.decode(np.random.default_rng(0).integers(1, CHARACTERS.size, 3000))
    held_out = ArraySplit(text, CHARACTERS)
    page = (model.export(tmp_path / "page", "html", held_out) / "index.html").read_text("utf-8")
    about = re.search(r'<p class="about">(.*?)</p>', page, re.S)[1]
    assert (
        "A GRU of 2 \N{MULTIPLICATION SIGN} 8 units:" in about
        and f"{sampling_page.count(model.params):,} parameters" in about
    )
    assert "from secret &lt;b&gt;plays, one" in about and "someone" not in page
    exact, after = (
        model.evaluate(held_out).bits_per_symbol,
        rounded(model, "float16").evaluate(held_out).bits_per_symbol,
    )
    assert f"{after:.3f} bits for a character" in about and f"{exact:.3f} before" in about
    said = capsys.readouterr().err
    assert f"{after:.4f} bits per character" in said and f"{exact:.4f} as trained" in said and "3,000 symbols" in said
    model.export(tmp_path / "unmeasured", "html")
    assert "was not measured" in capsys.readouterr().err


def test_the_page_of_a_server_finds_it_behind_a_proxy_at_a_path():
    address = re.search(r'"address": "(.*?)"', sampling_page.render_remote("mine", ""))[1]
    for page in ("http://127.0.0.1:8000/", "https://host/models/mine/"):
        assert urllib.parse.urljoin(page, address) == f"{page}v1/completions"


def test_the_page_of_a_server_shows_what_the_server_streams(browser, tmp_path):
    path = tmp_path / "remote.html"
    path.write_text(sampling_page.render_remote("mine <1>", "About & more.", "/v1/completions"), "utf-8")
    browser.open(path)
    assert browser.run("[document.title, document.querySelector('.about').textContent]") == [
        *("mine <1> writes", "About & more."),
    ]
    assert "connect-src 'self'" in path.read_text("utf-8")
    pieces = [("x€", {"€": -0.1, "a": -3}), ("\n", {"\n": -0.5, "b": -1.5})]
    browser.run(f"({SERVE})({json.dumps(pieces)})")
    assert ask(browser, prompt="ab", seed=9, topK=4, temperature=0.5, count=3) == "x€\n"
    first, peeked = browser.run("asked")
    expected = {"model": "mine <1>", "max_tokens": 3, "temperature": 0.5, "seed": 9, "stream": True, "logprobs": 10}
    assert first == expected | {"prompt": "ab", "top_k": 4, "return_state": True}
    assert peeked == expected | {"prompt": "abx€\n", "top_k": 4, "max_tokens": 1, "stop": ""}
    assert browser.run(BARS) == [["↵", "60.7 %"], ["b", "22.3 %"]]
    browser.run(
        'window.fetch = async () => new Response(\'{"error": {"message": "too many at a time"}}\', {status: 429})'
    )
    ask(browser, prompt="ab")
    assert browser.run(STATUS) == "too many at a time" and browser.run("document.querySelector('.status.bad') !== null")
    browser.run(f"({NEVER})()")
    browser.run(f"{WRITE}({{prompt: 'ab'}})")
    browser.press("Escape")
    assert browser.run(SETTLED) == "" and not browser.errors


def test_a_model_that_is_too_large_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_page, "MOST_PARAMETERS", 100)
    with pytest.raises(ValueError, match=r"at most 100 parameters into a page, and this model has [\d,]+: use format"):
        drawn("lstm").export(tmp_path / "page", "html")
    assert not list(tmp_path.iterdir())


def test_names_and_symbols_are_data_wherever_they_stand(browser, tmp_path):
    hostile = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">$name\0{}é"
    vocabulary = Vocabulary("characters", "".join(sorted(set(hostile))))
    model = drawn("lstm", vocabulary)
    exported = Exported(
        model.config, vocabulary, folded(model.params), 7, Path(hostile.replace("/", "_").replace("\0", ""))
    )
    sampling_page.write(exported, tmp_path)
    browser.open(tmp_path / "index.html")
    assert "taken" in browser.run("document.title") and browser.run("document.title").endswith("writes")
    assert browser.run("document.images.length") == 0 and browser.run("document.scripts.length") == 3
    ask(browser, prompt="<img src=x>", count=200)
    assert browser.run("document.images.length") == 0 and not browser.errors


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_legible_in_both_themes_and_fits_a_phone(theme, browser, tmp_path):
    opened(browser, drawn("lstm"), tmp_path)
    for width in (390, 1200):
        browser.screenshot(tmp_path / "page.png", theme, width=width, height=800)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        for ink, ground in browser.run(COLORS):
            assert contrast(ink, ground) >= 4.5
    browser.screenshot(tmp_path / "page.png", "light")


def contrast(*colors: str) -> float:
    """The ratio of two colors by WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colors))
    return (light + 0.05) / (dark + 0.05)
